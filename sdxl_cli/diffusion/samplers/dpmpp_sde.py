"""DPM-Solver++ for the stochastic equation, one step at a time (k-diffusion)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, moved, option, pairs
from sdxl_cli.diffusion.samplers.stochastic import ancestral_levels


@dataclass(frozen=True, kw_only=True)
class DPMppSDE(Sampler):
    """Goes part of the way with noise, looks again, and goes all the way; both noises are of one Brownian path."""

    name: str = "dpmpp_sde"
    label: str = "DPM++ SDE"
    grid: str = "karras"
    order = 2
    evaluations = 2
    randomness = "path"

    eta: float = option(1.0, "share of noise added after a step: 0 none, 1 as in DDPM")
    s_noise: float = option(1.0, "how strong that noise is")
    r: float = option(0.5, "where in log sigma to look again, 0 … 1", low=0.01, high=1.0)

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        for sigma, following in pairs(sigmas):
            denoised = denoise(x, sigma)
            if following == 0:
                x = moved(x, denoised, sigma, following)
            else:
                middle = sigma * (following / sigma) ** self.r
                half = self._down_and_up(x, denoised, sigma, middle, noise)
                mixed = denoised + (denoise(half, middle) - denoised) / (2 * self.r)
                x = self._down_and_up(x, mixed, sigma, following, noise)
            yield x

    def _down_and_up(self, x: Tensor, denoised: Tensor, sigma: float, target: float, noise: Noise) -> Tensor:
        down, up = ancestral_levels(sigma, target, self.eta)
        x = moved(x, denoised, sigma, down)
        return x + noise.between(x, sigma, target) * (self.s_noise * up) if up else x
