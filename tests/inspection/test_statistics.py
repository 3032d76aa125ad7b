"""Numbers about latents, beside numpy's and torch's."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import Tensor

from sdxl_cli.inspection.families import FAMILIES, colour_likeness, likeness
from sdxl_cli.inspection.statistics import BINS, LatentStatistics, frechet, measure


def over(latents: Sequence[Tensor]) -> LatentStatistics:
    return measure(lambda: latents)


def gaussian(
    count: int, mean: Sequence[float], std: Sequence[float], seed: int = 0, side: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(mean), 1, 1)
    spread, centre = torch.tensor(std).view(shape), torch.tensor(mean).view(shape)
    return [torch.randn(len(mean), side, side, generator=generator) * spread + centre for _ in range(count)]


def test_a_known_gaussian_has_the_statistics_it_was_made_with() -> None:
    found = over(gaussian(1000, (2.0, -1.0), (7.0, 0.5)))
    first, second = found.channels
    assert (found.latents, first.count, found.together.count) == (1000, 256_000, 512_000)
    assert [first.mean, second.mean] == pytest.approx([2.0, -1.0], abs=0.05)
    assert [first.std, second.std] == pytest.approx([7.0, 0.5], rel=0.01)
    # beyond 4 deviations
    assert first.outliers == pytest.approx(math.erfc(4 / math.sqrt(2)), rel=0.5)
    assert [first.skewness, first.kurtosis] == pytest.approx([0.0, 0.0], abs=0.03)
    # a bin of the histogram has its share of the Gaussian
    bin_ = BINS // 2 + 8
    edges = [first.histogram.low + (bin_ + i) * first.histogram.width for i in (0, 1)]
    expected = stats.norm(2.0, 7.0).cdf(edges[1]) - stats.norm(2.0, 7.0).cdf(edges[0])
    assert first.histogram.counts[bin_] / first.count == pytest.approx(expected, rel=0.04)


def test_the_numbers_are_those_of_numpy_and_scipy_over_everything_at_once() -> None:
    parts = [*gaussian(3, (-1.0,), (2.0,)), torch.tensor([[[40.0, -90.0]]]), torch.zeros(1, 5, 7)]
    (found,) = over(parts).channels
    flat = np.concatenate([part.numpy().ravel() for part in parts]).astype(np.float64)
    assert found.mean == pytest.approx(flat.mean(), rel=1e-12)
    assert found.std == pytest.approx(flat.std(), rel=1e-12)
    assert (found.minimum, found.maximum) == (-90.0, 40.0)
    assert found.outliers == (np.abs(flat - flat.mean()) > 4 * flat.std()).mean()
    assert found.skewness == pytest.approx(stats.skew(flat), rel=1e-10)
    assert found.kurtosis == pytest.approx(stats.kurtosis(flat), rel=1e-10)


def test_a_histogram_is_numpys_with_all_that_is_beyond_in_the_outermost_bins() -> None:
    values = torch.randn(1, 40, 50, generator=torch.Generator().manual_seed(0)).double()
    values[0, 0, :2] = torch.tensor([80.0, -70.0])
    found = over([values[:, :20], values[:, 20:]]).channels[0].histogram
    flat = values.numpy().ravel()
    low, high = flat.mean() - 5 * flat.std(), flat.mean() + 5 * flat.std()
    counts, _ = np.histogram(flat.clip(low, high), bins=BINS, range=(low, high))
    assert found.counts == tuple(counts)
    assert (found.counts[0], found.counts[-1]) == (1, 1)
    assert [found.low, found.width] == pytest.approx([low, 10 * flat.std() / BINS], rel=1e-12)


def test_a_large_mean_does_not_eat_a_small_deviation() -> None:
    found = over([torch.tensor([[[1e6 - 0.25, 1e6 + 0.25]]])] * 1000)
    assert found.together.std == 0.25


def test_one_latent_at_a_time_is_in_memory() -> None:
    """Both passes let go of a latent when they have the next."""
    made: list[weakref.ref[Tensor]] = []

    def latents() -> Iterator[Tensor]:
        for _ in range(5):
            latent = torch.randn(2, 4, 4)
            made.append(weakref.ref(latent))
            assert sum(ref() is not None for ref in made) <= 2
            yield latent

    assert measure(latents).latents == 5
    assert len(made) == 10


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    rows = ([1.0, math.nan, 3.0], [math.inf], [-math.inf])
    found = over([torch.tensor([[row]]) for row in rows]).together
    assert (found.count, found.non_finite, found.mean, found.std) == (2, 3, 2.0, 1.0)


def test_where_nothing_is_finite_there_are_no_numbers() -> None:
    found = over([torch.full((1, 1, 3), math.nan)]).together
    assert (found.count, found.non_finite) == (0, 3)
    assert all(math.isnan(v) for v in (found.mean, found.std, found.minimum, found.maximum, found.outliers))


def mixed(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, 4, generator=generator)
    noise = [torch.randn(4, *size, generator=generator) for size in ((8, 8), (6, 10))]
    return [torch.einsum("ab,bhw->ahw", mixing, part) + seed for part in noise]


def test_covariances_and_correlations_are_those_of_torch() -> None:
    found = over(mixed())
    together = torch.cat([latent.flatten(1) for latent in mixed()], dim=1).double()
    torch.testing.assert_close(torch.tensor(found.correlation).double(), torch.corrcoef(together))
    torch.testing.assert_close(
        torch.tensor(found.covariance).double(), torch.cov(together, correction=0), rtol=1e-6, atol=0
    )


def test_correlations_leave_out_positions_that_are_not_finite() -> None:
    latent = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    spoiled = latent.clone()
    spoiled[1, 0, 0] = math.inf
    expected = torch.corrcoef(latent.flatten(1)[:, 1:].double())
    torch.testing.assert_close(torch.tensor(over([spoiled]).correlation).double(), expected)


def test_the_frechet_distance_is_that_of_the_root_of_a_matrix() -> None:
    ours, theirs = over(mixed(0)), over(mixed(1))
    means = [np.array([c.mean for c in one.channels]) for one in (ours, theirs)]
    covariances = [np.array(one.covariance) for one in (ours, theirs)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet(ours, theirs) == pytest.approx(expected, rel=1e-9)
    assert frechet(ours, ours) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("scaled", [False, True])
def test_latents_with_the_published_statistics_of_a_family_look_like_it(family: object, scaled: bool) -> None:
    by = family.scale_factor if scaled else 1.0  # type: ignore[attr-defined]
    mean, std = ([value * by for value in values] for values in (family.mean, family.std))  # type: ignore[attr-defined]
    found = likeness(over(gaussian(8, mean, std)))
    assert (found.family, found.scaled) == (family.name, scaled)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.0, 0.0, 0.0, 0.0), (7.7, 7.7, 7.7, 7.7)),
        ((0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)),
        # half way between the two
        ((2.08, 2.57, -0.63, 0.18), (6.3, 5.3, 5.1, 4.3)),
        ((90.0, 0.0, 0.0, 0.0), (7.7, 7.7, 7.7, 7.7)),
    ],
)
def test_where_one_cannot_tell_nothing_is_guessed(mean: Sequence[float], std: Sequence[float]) -> None:
    found = likeness(over(gaussian(8, mean, std)))
    assert found.family is None
    assert found.says


def test_latents_of_16_channels_are_of_neither_family() -> None:
    found = likeness(over(gaussian(2, [0.0] * 16, [1.0] * 16)))
    assert found.family is None
    assert "these 16" in found.says


def test_a_family_is_told_by_its_colours_whatever_their_strength() -> None:
    for family in FAMILIES:
        like = colour_likeness([[value * 0.3 for value in row] for row in family.colours])
        assert like.pop(family.name) == pytest.approx(1)
        assert all(abs(value) < 0.6 for value in like.values())
