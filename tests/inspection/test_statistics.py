"""Numbers about latents, beside numpy's and torch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxl_cli.inspection.statistics import correlation, statistics


def gaussian(count: int, mean: float, std: float, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 16, generator=generator) * std + mean for _ in range(count)]


def test_a_known_gaussian_has_the_statistics_it_was_made_with() -> None:
    found = statistics(gaussian(1000, 2.0, 7.0))
    assert found.count == 256_000
    assert found.mean == pytest.approx(2.0, abs=0.05)
    assert found.std == pytest.approx(7.0, rel=0.01)
    # beyond 4 deviations
    assert found.outliers == pytest.approx(math.erfc(4 / math.sqrt(2)), rel=0.5)
    assert found.non_finite == 0


def test_the_numbers_are_those_of_numpy_over_everything_at_once() -> None:
    parts = [*gaussian(3, -1.0, 2.0), torch.tensor([[40.0, -90.0]]), torch.zeros(5, 7)]
    found = statistics(parts)
    flat = np.concatenate([part.numpy().ravel() for part in parts]).astype(np.float64)
    assert found.mean == pytest.approx(flat.mean(), rel=1e-12)
    assert found.std == pytest.approx(flat.std(), rel=1e-12)
    assert (found.minimum, found.maximum) == (-90.0, 40.0)
    assert found.outliers == (np.abs(flat - flat.mean()) > 4 * flat.std()).mean()


def test_a_large_mean_does_not_eat_a_small_deviation() -> None:
    found = statistics([torch.tensor([1e6 - 0.25, 1e6 + 0.25])] * 1000)
    assert found.std == 0.25


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    found = statistics(
        [torch.tensor([1.0, math.nan, 3.0]), torch.tensor([math.inf]), torch.tensor([-math.inf])]
    )
    assert (found.count, found.non_finite, found.mean, found.std) == (2, 3, 2.0, 1.0)


def test_where_nothing_is_finite_there_are_no_numbers() -> None:
    found = statistics([torch.full((3,), math.nan)])
    assert (found.count, found.non_finite) == (0, 3)
    assert all(math.isnan(v) for v in (found.mean, found.std, found.minimum, found.maximum, found.outliers))


def test_correlations_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 4, generator=generator)
    latents = [
        torch.einsum("ab,bhw->ahw", mixing, torch.randn(4, *size, generator=generator))
        for size in ((8, 8), (6, 10))
    ]
    together = torch.cat([latent.flatten(1) for latent in latents], dim=1).double()
    torch.testing.assert_close(torch.tensor(correlation(latents)).double(), torch.corrcoef(together))


def test_correlations_leave_out_positions_that_are_not_finite() -> None:
    latent = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    spoiled = latent.clone()
    spoiled[1, 0, 0] = math.inf
    expected = torch.corrcoef(latent.flatten(1)[:, 1:].double())
    torch.testing.assert_close(torch.tensor(correlation([spoiled])).double(), expected)
