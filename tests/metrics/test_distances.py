"""FID, KID and IS against torch-fidelity and torchmetrics on the same features, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import _compute_fid

from sdxl_cli.metrics.distances import (
    Gaussian,
    frechet_distance,
    gaussian,
    inception_score,
    kernel_distance,
)


class Memory:
    """Rows of a tensor."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        return self.values[torch.from_numpy(indices)]


def features(count: int, dim: int, seed: int) -> Tensor:
    """Correlated, shifted, not negative: as the network's."""
    noise = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, dim, generator=noise) @ torch.randn(dim, dim, generator=noise) / math.sqrt(dim)
    return (mixed + 0.3 * seed).clamp_min(0)


def theirs(one: Tensor, other: Tensor) -> float:
    stats = [fid_features_to_statistics(part.double()) for part in (one, other)]
    return float(fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"])


def test_fid_is_that_of_torch_fidelity_and_torchmetrics() -> None:
    one, other = features(400, 64, 1), features(300, 64, 2)
    a, b = gaussian([one]), gaussian([other])
    found = frechet_distance(a, b)
    assert found == pytest.approx(theirs(one, other), rel=1e-9)
    assert found == pytest.approx(float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance)), rel=1e-9)
    assert found > 1


def test_fid_of_fewer_pictures_than_features_is_theirs_too() -> None:
    one, other = features(20, 64, 1), features(30, 64, 2)
    assert frechet_distance(gaussian([one]), gaussian([other])) == pytest.approx(theirs(one, other), rel=1e-6)


def test_fid_of_known_gaussians_is_the_closed_form() -> None:
    """Of commuting covariances: |m1 - m2|² + Σ (√a - √b)²."""
    noise = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(16, 16, generator=noise, dtype=torch.float64))
    a, b = (torch.rand(16, generator=noise, dtype=torch.float64) * 4 for _ in range(2))
    means = torch.randn(2, 16, generator=noise, dtype=torch.float64)
    one = Gaussian(means[0], basis * a @ basis.T, 100)
    other = Gaussian(means[1], basis * b @ basis.T, 100)
    expected = (means[0] - means[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-12)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-10)


def test_moments_in_parts_are_those_of_the_whole_far_from_zero() -> None:
    values = features(101, 8, 1).double() + 1e4
    found = gaussian(iter(values.split(7)))
    torch.testing.assert_close(found.mean, values.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.covariance, torch.cov(values.T), rtol=1e-9, atol=1e-9)
    assert found.count == 101
    with pytest.raises(ValueError, match="1 rows"):
        gaussian([values[:1]])


def test_kid_is_that_of_torch_fidelity() -> None:
    one, other = features(120, 32, 1), features(90, 32, 2)
    found = kernel_distance(Memory(one), Memory(other), subsets=7, size=50)
    expected = kid_features_to_metric(
        one.double(), other.double(), kid_subsets=7, kid_subset_size=50, verbose=False
    )
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-8)
    assert found.parts == 7
    with pytest.raises(ValueError, match="subsets of 100"):
        kernel_distance(Memory(one), Memory(other), size=100)


def test_kid_of_two_halves_of_the_same_is_about_nothing_where_fid_is_not() -> None:
    one, other = features(400, 32, 1).chunk(2)
    kid = kernel_distance(Memory(one), Memory(other), subsets=20, size=100)
    far = kernel_distance(Memory(one), Memory(features(200, 32, 2)), subsets=20, size=100)
    assert abs(kid.mean) < 0.05 * far.mean
    assert frechet_distance(gaussian([one]), gaussian([other])) > 0.05


def test_the_inception_score_is_that_of_torch_fidelity() -> None:
    logits = features(103, 40, 1) * 3
    found = inception_score(Memory(logits))
    expected = isc_features_to_metric(logits)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-9)
    with pytest.raises(ValueError, match="5 pictures"):
        inception_score(Memory(logits[:5]))
