"""The sampler of latent consistency models (arXiv 2310.04378, Algorithm 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, option, pairs


@dataclass(frozen=True, kw_only=True)
class LCM(Sampler):
    """The denoised latent, and fresh noise up to the next level.

    The boundary scalings of the paper (c_skip below 7e-6 at timestep 19 and above) are left out, as in ComfyUI.
    """

    name: str = "lcm"
    label: str = "LCM"
    grid: str = "lcm"
    order = 0  # does not follow the probability flow
    randomness = "fresh"

    s_noise: float = option(1.0, "how strong the noise is")

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        for sigma, following in pairs(sigmas):
            x = denoise(x, sigma)
            if following > 0:
                x = x + noise.fresh(x) * (self.s_noise * following)
            yield x
