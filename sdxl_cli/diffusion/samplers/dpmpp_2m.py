"""DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2, in the variable h = Δ(-log sigma))."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise


class DPMpp2M:
    """Second-order multistep: extrapolates the denoised latent with the previous one.

    The first step, and the step to sigma 0, are first order (facts: sgm DPMPP2MSampler).
    """

    name = "dpmpp_2m"
    label = "DPM++ 2M"

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        levels = sigmas.tolist()
        previous: Tensor | None = None
        last_h = 0.0
        for sigma, following in zip(levels, levels[1:], strict=False):
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
