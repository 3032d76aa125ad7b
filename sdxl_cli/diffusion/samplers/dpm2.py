"""DPM-Solver-2 in k-diffusion's form, after Algorithm 2 of arXiv 2206.00364."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, moved, pairs
from sdxl_cli.diffusion.samplers.stochastic import Churned


def midpoint_step(denoise: Denoise, x: Tensor, sigma: float, target: float) -> Tensor:
    """A step with the slope half way in log sigma; a step to 0 is Euler's.

    Args:
        denoise: D(x; sigma).
        x: at level ``sigma``.
        sigma: where the step begins.
        target: where it ends, 0 or more.
    """
    denoised = denoise(x, sigma)
    if target == 0:
        return moved(x, denoised, sigma, target)
    middle = math.sqrt(sigma * target)
    half = moved(x, denoised, sigma, middle)
    return x + (target - sigma) * ((half - denoise(half, middle)) / middle)


@dataclass(frozen=True, kw_only=True)
class DPM2(Churned):
    """The midpoint method, with the middle taken in log sigma."""

    name: str = "dpm2"
    label: str = "DPM2"
    grid: str = "karras"
    order = 2
    evaluations = 2
    skips_penultimate = True

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        steps = pairs(sigmas)
        for level, following in steps:
            x, sigma = self.churned(x, level, len(steps), noise)
            x = midpoint_step(denoise, x, sigma, following)
            yield x
