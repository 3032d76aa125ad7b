"""Heun's method (arXiv 2206.00364, Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, moved, pairs
from sdxl_cli.diffusion.samplers.stochastic import Churned


@dataclass(frozen=True, kw_only=True)
class Heun(Churned):
    """Euler's step, then the same with the mean of the slopes at both ends; the step to 0 is Euler's."""

    name: str = "heun"
    label: str = "Heun"
    grid: str = "sgm"
    order = 2
    evaluations = 2

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        steps = pairs(sigmas)
        for level, following in steps:
            x, sigma = self.churned(x, level, len(steps), noise)
            denoised = denoise(x, sigma)
            end = moved(x, denoised, sigma, following)
            if following > 0:
                slopes = (x - denoised) / sigma + (end - denoise(end, following)) / following
                end = x + (following - sigma) / 2 * slopes
            x = end
            yield x
