"""Euler's method (arXiv 2206.00364, Algorithm 2 without the correction; the original demo's sampler)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, moved, pairs
from sdxl_cli.diffusion.samplers.stochastic import Churned


@dataclass(frozen=True, kw_only=True)
class Euler(Churned):
    """dx/dsigma = (x - D) / sigma, first order."""

    name: str = "euler"
    label: str = "Euler"
    grid: str = "sgm"
    order = 1

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        steps = pairs(sigmas)
        for level, following in steps:
            x, sigma = self.churned(x, level, len(steps), noise)
            x = moved(x, denoise(x, sigma), sigma, following)
            yield x
