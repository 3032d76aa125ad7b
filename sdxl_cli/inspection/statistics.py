"""Numbers about latents, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OUTLIER = 4.0
"""Values further than this many deviations from the mean are outliers: of a Gaussian, 1 in 15787."""


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
    non_finite: int
    """Values that are NaN or infinite; the other numbers leave them out."""


def statistics(values: Sequence[Tensor]) -> Statistics:
    """Of many tensors as if they were one, in float64, and in two passes: nothing cancels.

    Args:
        values: of any shapes.
    """
    finite = [part[torch.isfinite(part)].double() for part in values]
    count = sum(part.numel() for part in finite)
    non_finite = sum(part.numel() for part in values) - count
    if not count:
        nan = math.nan
        return Statistics(
            count=0, mean=nan, std=nan, minimum=nan, maximum=nan, outliers=nan, non_finite=non_finite
        )
    finite = [part for part in finite if part.numel()]
    mean = sum(float(part.sum()) for part in finite) / count
    std = math.sqrt(sum(float((part - mean).square().sum()) for part in finite) / count)
    far = sum(int(((part - mean).abs() > OUTLIER * std).sum()) for part in finite)
    return Statistics(
        count=count,
        mean=mean,
        std=std,
        minimum=min(float(part.min()) for part in finite),
        maximum=max(float(part.max()) for part in finite),
        outliers=far / count,
        non_finite=non_finite,
    )


def correlation(latents: Sequence[Tensor]) -> list[list[float]]:
    """Pearson's correlation of every two channels, -1 … 1, over the positions where all channels are finite.

    Channels that say nearly the same are room that is not used. NaN for a channel that is constant.

    Args:
        latents: [z, h, w] each.
    """
    columns = [
        latent.flatten(1)[:, torch.isfinite(latent).all(dim=0).flatten()].double() for latent in latents
    ]
    count = sum(part.shape[1] for part in columns)
    mean = torch.stack([part.sum(dim=1) for part in columns]).sum(dim=0) / count
    centred = [part - mean[:, None] for part in columns]
    covariance = torch.stack([part @ part.T for part in centred]).sum(dim=0)
    std = covariance.diagonal().sqrt()
    table: list[list[float]] = (covariance / std[:, None] / std[None]).tolist()
    return table
