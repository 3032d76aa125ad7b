"""DPM2 with fresh noise after every step (k-diffusion)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, option, pairs
from sdxl_cli.diffusion.samplers.dpm2 import midpoint_step
from sdxl_cli.diffusion.samplers.stochastic import ancestral_levels


@dataclass(frozen=True, kw_only=True)
class DPM2Ancestral(Sampler):
    """Down by the midpoint method, up by noise."""

    name: str = "dpm2_a"
    label: str = "DPM2 a"
    grid: str = "karras"
    order = 2
    evaluations = 2
    randomness = "fresh"
    skips_penultimate = True

    eta: float = option(1.0, "share of noise added after a step: 0 none, 1 as in DDPM")
    s_noise: float = option(1.0, "how strong that noise is")

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        for sigma, following in pairs(sigmas):
            down, up = ancestral_levels(sigma, following, self.eta)
            x = midpoint_step(denoise, x, sigma, down)
            if up:
                x = x + noise.fresh(x) * (self.s_noise * up)
            yield x
