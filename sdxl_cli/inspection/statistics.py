"""Numbers about latents, channel by channel: two passes in float64, one latent in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

OUTLIER = 4.0
"""Values further than this many deviations from the mean are outliers: of a Gaussian, 1 in 15787."""
SPAN = 5.0
"""Deviations that a histogram reaches to either side of the mean; what is beyond is in its outermost bins."""
BINS = 80

Pass = Callable[[], Iterable[Tensor]]
"""Goes through all latents [z, h, w] from the start; the same ones every time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Counts of values in bins of one width; the first and the last have what is beyond them, too."""

    low: float
    """Where the first bin begins."""
    width: float
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Of all finite values of a channel, or of all channels together. NaN where there are none."""

    count: int
    mean: float
    std: float
    """Of the whole population."""
    minimum: float
    maximum: float
    outliers: float
    """Share of the values that are outliers, 0 … 1."""
    skewness: float
    """Third standardised moment: 0 of a Gaussian. NaN where all values are one."""
    kurtosis: float
    """Fourth standardised moment less 3: 0 of a Gaussian, above where tails are heavy."""
    non_finite: int
    """Values that are NaN or infinite; the other numbers leave them out."""
    histogram: Histogram


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentStatistics:
    """Of many latents."""

    latents: int
    channels: tuple[Statistics, ...]
    together: Statistics
    """All channels."""
    covariance: tuple[tuple[float, ...], ...]
    """Of every two channels, over the positions where all are finite."""
    correlation: tuple[tuple[float, ...], ...]
    """Pearson's, -1 … 1. Channels that say nearly the same are room that is not used. NaN of one that is constant."""


def measure(every: Pass) -> LatentStatistics:
    """The statistics of many latents as if they were one.

    The first pass gathers means and deviations, merged latent by latent as Chan, Golub and LeVeque do (1983), so
    that nothing cancels however many there are; the second what is counted relative to them.

    Args:
        every: called twice.
    """
    first: _Moments | None = None
    latents = 0
    for latent in every():
        first = first or _Moments(len(latent))
        first.add(latent)
        latents += 1
    assert first is not None, "there is nothing to measure"
    means, stds = first.means(), first.stds()
    second = _Counts(means, stds)
    for latent in every():
        second.add(latent)
    rows = [
        second.statistics(row, int(first.count[row]), first.low[row], first.high[row], int(first.bad[row]))
        for row in range(len(means))
    ]
    covariance = first.covariance()
    deviations = covariance.diagonal().sqrt()
    return LatentStatistics(
        latents=latents,
        channels=tuple(rows[:-1]),
        together=rows[-1],
        covariance=_table(covariance),
        correlation=_table(covariance / deviations[:, None] / deviations[None]),
    )


class _Moments:
    """Count, mean, squared deviations and range of every channel, and in the last row of all together."""

    def __init__(self, channels: int) -> None:
        rows = channels + 1
        self.count, self.mean, self.squares, self.bad = (
            torch.zeros(rows, dtype=torch.float64) for _ in range(4)
        )
        self.low = torch.full((rows,), math.inf, dtype=torch.float64)
        self.high = -self.low
        self._whole = 0
        """Positions where all channels are finite."""
        self._centre = torch.zeros(channels, dtype=torch.float64)
        self._products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, latent: Tensor) -> None:
        """A latent [z, h, w]."""
        flat = latent.flatten(1).double()
        for row, values in enumerate([*flat, flat]):
            finite = values[torch.isfinite(values)]
            self.bad[row] += values.numel() - finite.numel()
            if not finite.numel():
                continue
            self._merge(row, finite)
        whole = flat[:, torch.isfinite(flat).all(dim=0)]
        if whole.shape[1]:
            count, centre = whole.shape[1], whole.mean(dim=1)
            centred, step = whole - centre[:, None], centre - self._centre
            total = self._whole + count
            self._products += centred @ centred.T + torch.outer(step, step) * (self._whole * count / total)
            self._centre += step * (count / total)
            self._whole = total

    def _merge(self, row: int, values: Tensor) -> None:
        count, mean = values.numel(), values.mean()
        step, before = mean - self.mean[row], float(self.count[row])
        total = before + count
        self.squares[row] += (values - mean).square().sum() + step.square() * (before * count / total)
        self.mean[row] += step * (count / total)
        self.count[row] = total
        self.low[row] = torch.minimum(self.low[row], values.min())
        self.high[row] = torch.maximum(self.high[row], values.max())

    def means(self) -> Tensor:
        """[rows]; NaN where nothing is finite."""
        return torch.where(self.count > 0, self.mean, math.nan)

    def stds(self) -> Tensor:
        """[rows]; NaN where nothing is finite."""
        return (self.squares / self.count).sqrt()

    def covariance(self) -> Tensor:
        """[z, z]."""
        return self._products / self._whole if self._whole else torch.full_like(self._products, math.nan)


class _Counts:
    """What is counted relative to mean and deviation."""

    def __init__(self, means: Tensor, stds: Tensor) -> None:
        """Both [rows], the last of all channels together."""
        self.means, self.stds = means.tolist(), stds.tolist()
        rows = len(means)
        self.outliers = [0] * rows
        self.cubes, self.fourths = (torch.zeros(rows, dtype=torch.float64) for _ in range(2))
        self.bins = torch.zeros(rows, BINS, dtype=torch.float64)

    def add(self, latent: Tensor) -> None:
        """A latent [z, h, w]."""
        flat = latent.flatten(1).double()
        for row, values in enumerate([*flat, flat]):
            finite = values[torch.isfinite(values)]
            std = self.stds[row]
            if not finite.numel() or not std > 0:
                continue
            units = (finite - self.means[row]) / std
            self.outliers[row] += int((units.abs() > OUTLIER).sum())
            self.cubes[row] += units.pow(3).sum()
            self.fourths[row] += units.pow(4).sum()
            # clamped just inside, as a value on the upper edge would belong to a bin that is not there
            inside = (units + SPAN).mul(BINS / (2 * SPAN)).clamp(0, BINS - 0.5)
            self.bins[row] += torch.bincount(inside.long(), minlength=BINS)

    def statistics(self, row: int, count: int, low: Tensor, high: Tensor, bad: int) -> Statistics:
        """The numbers of a row."""
        mean, std, nan = self.means[row], self.stds[row], math.nan
        spread = count > 0 and std > 0
        return Statistics(
            count=count,
            mean=mean,
            std=std,
            minimum=float(low) if count else nan,
            maximum=float(high) if count else nan,
            outliers=self.outliers[row] / count if count else nan,
            skewness=float(self.cubes[row]) / count if spread else nan,
            kurtosis=float(self.fourths[row]) / count - 3 if spread else nan,
            non_finite=bad,
            histogram=Histogram(
                low=mean - SPAN * std,
                width=2 * SPAN * std / BINS,
                counts=tuple(int(n) for n in self.bins[row].tolist()),
            ),
        )


def frechet(ours: LatentStatistics, theirs: LatentStatistics) -> float:
    """The Fréchet distance of two Gaussians with these means and covariances, squared: 0 is the same.

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) (Dowson and Landau, 1982), on latent positions instead of features.
    The trace of the root is the sum of the roots of the eigenvalues of C1^½ C2 C1^½, which is symmetric.
    """
    means = torch.tensor([[c.mean for c in one.channels] for one in (ours, theirs)], dtype=torch.float64)
    first, second = (torch.tensor(one.covariance, dtype=torch.float64) for one in (ours, theirs))
    if not bool(torch.isfinite(torch.stack([first, second])).all()):
        return math.nan
    values, vectors = torch.linalg.eigh(first)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    distance = (means[0] - means[1]).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, float(distance))


def _table(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
