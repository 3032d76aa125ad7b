"""Euler's method with fresh noise after every step: Euler a, DDIM and DDPM are the same formula."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, moved, option, pairs
from sdxl_cli.diffusion.samplers.stochastic import ancestral_levels


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(Sampler):
    """Down by Euler's step, and up again by noise (k-diffusion).

    In the scaling clean + sigma · noise, DDIM (arXiv 2010.02502, eq. 12 and 16) is this with the eta of its paper,
    0 unless asked for, and DDPM's posterior with the smaller variance (arXiv 2006.11239) this with eta = 1.
    """

    name: str = "euler_a"
    label: str = "Euler a"
    grid: str = "sgm"
    order = 1
    randomness = "fresh"

    eta: float = option(1.0, "share of noise added after a step: 0 none, 1 as in DDPM")
    s_noise: float = option(1.0, "how strong that noise is")

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        for sigma, following in pairs(sigmas):
            down, up = ancestral_levels(sigma, following, self.eta)
            x = moved(x, denoise(x, sigma), sigma, down)
            if up:
                x = x + noise.fresh(x) * (self.s_noise * up)
            yield x
