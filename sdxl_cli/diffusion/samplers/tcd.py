"""The sampler of trajectory consistency distillation (arXiv 2402.19159, Algorithm 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, moved, option, pairs
from sdxl_cli.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class TCD(Sampler):
    """Below the next level by gamma, counted in timesteps, and up to it by fresh noise.

    eta is the gamma of the paper: 0 is Euler's method, 1 is nearly LCM.
    """

    name: str = "tcd"
    label: str = "TCD"
    grid: str = "lcm"
    order = 1
    randomness = "fresh"

    eta: float = option(0.3, "the paper's gamma: 0 no noise, 1 all noise new", high=1.0)
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule, repr=False, compare=False)
    """The model's 1000 levels, between which gamma counts."""

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        for sigma, following in pairs(sigmas):
            down = self._below(following)
            x = moved(x, denoise(x, sigma), sigma, down)
            if down < following:
                x = x + noise.fresh(x) * math.sqrt(following**2 - down**2)
            yield x

    def _below(self, level: float) -> float:
        if self.eta == 0 or level == 0:
            return level
        index = math.floor((1 - self.eta) * self.schedule.index_of(level))
        return min(level, float(self.schedule.sigmas[index]))
