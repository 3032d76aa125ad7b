"""DPM-Solver++(2S) with fresh noise after every step (arXiv 2211.01095, Algorithm 1; k-diffusion)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, moved, option, pairs
from sdxl_cli.diffusion.samplers.stochastic import ancestral_levels


@dataclass(frozen=True, kw_only=True)
class DPMpp2SAncestral(Sampler):
    """A step with the D of half way in log sigma; a step to 0 is Euler's."""

    name: str = "dpmpp_2s_a"
    label: str = "DPM++ 2S a"
    grid: str = "karras"
    order = 2
    evaluations = 2
    randomness = "fresh"

    eta: float = option(1.0, "share of noise added after a step: 0 none, 1 as in DDPM")
    s_noise: float = option(1.0, "how strong that noise is")

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        for sigma, following in pairs(sigmas):
            down, up = ancestral_levels(sigma, following, self.eta)
            denoised = denoise(x, sigma)
            if down > 0:
                middle = math.sqrt(sigma * down)
                denoised = denoise(moved(x, denoised, sigma, middle), middle)
            x = moved(x, denoised, sigma, down)
            if up:
                x = x + noise.fresh(x) * (self.s_noise * up)
            yield x
