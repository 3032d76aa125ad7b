"""DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2, in the variable h = Δ(-log sigma))."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, pairs


@dataclass(frozen=True, kw_only=True)
class DPMpp2M(Sampler):
    """Second-order multistep: extrapolates the denoised latent with the previous one.

    The first step, and the step to sigma 0, are first order (facts: sgm DPMPP2MSampler).
    """

    name: str = "dpmpp_2m"
    label: str = "DPM++ 2M"
    grid: str = "karras"
    order = 2

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        previous: Tensor | None = None
        last_h = 0.0
        for sigma, following in pairs(sigmas):
            denoised = denoise(x, sigma)
            target = denoised
            if following == 0.0:
                x = denoised
            else:
                h = math.log(sigma / following)
                if previous is not None:
                    r = last_h / h
                    target = denoised + (denoised - previous) / (2 * r)
                x = (following / sigma) * x - math.expm1(-h) * target
                last_h = h
            previous = denoised
            yield x
