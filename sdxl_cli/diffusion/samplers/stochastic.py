"""The two ways of k-diffusion to add noise: before a step (churn), and after one that went too far (ancestral)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Noise, Sampler, option


def ancestral_levels(sigma: float, following: float, eta: float) -> tuple[float, float]:
    """How far down to go, and how much noise to add there to be at ``following``.

    up = eta · sqrt(following² (sigma² - following²) / sigma²), no more than ``following``; down² + up² = following².
    For eta = 1 this is the posterior of DDPM (arXiv 2006.11239, eq. 7) in the scaling clean + sigma · noise.
    """
    up = min(following, eta * math.sqrt(max(sigma**2 - following**2, 0.0)) * following / sigma)
    return math.sqrt(following**2 - up**2), up


@dataclass(frozen=True, kw_only=True)
class Churned(Sampler):
    """A sampler that may add noise before a step and remove it again (arXiv 2206.00364, Algorithm 2)."""

    s_churn: float = option(0.0, "noise added before steps, over all of them")
    s_tmin: float = option(0.0, "lowest level where it is")
    s_tmax: float = option(float("inf"), "highest level where it is")
    s_noise: float = option(1.0, "how strong that noise is")

    def churned(self, x: Tensor, sigma: float, steps: int, noise: Noise) -> tuple[Tensor, float]:
        """x and its level, raised by gamma = min(s_churn / steps, sqrt(2) - 1)."""
        if self.s_churn == 0 or not self.s_tmin <= sigma <= self.s_tmax:
            return x, sigma
        raised = sigma * (1 + min(self.s_churn / steps, math.sqrt(2) - 1))
        return x + noise.fresh(x) * (self.s_noise * math.sqrt(raised**2 - sigma**2)), raised
