"""DPM-Solver++(2M) for the stochastic equation (arXiv 2211.01095, appendix; the form is k-diffusion's)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, option, pairs


@dataclass(frozen=True, kw_only=True)
class DPMpp2MSDE(Sampler):
    """Second-order multistep in H = (1 + eta) · Δ(-log sigma), and noise of variance following² (1 - e^(-2 eta h))."""

    name: str = "dpmpp_2m_sde"
    label: str = "DPM++ 2M SDE"
    grid: str = "exponential"
    order = 2
    randomness = "path"

    eta: float = option(1.0, "0 follows the probability flow, 1 the reverse diffusion")
    s_noise: float = option(1.0, "how strong the noise is")
    solver_type: str = option("midpoint", "of the second-order term", among=("midpoint", "heun"))

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        previous: Tensor | None = None
        last_h = 0.0
        for sigma, following in pairs(sigmas):
            denoised = denoise(x, sigma)
            if following == 0:
                x = denoised
            else:
                h = math.log(sigma / following)
                decay = (1 + self.eta) * h
                gone = -math.expm1(-decay)
                x = math.exp(-decay) * x + gone * denoised
                if previous is not None:
                    weight = gone / 2 if self.solver_type == "midpoint" else 1 - gone / decay
                    x = x + weight * (h / last_h) * (denoised - previous)
                if self.eta:
                    spread = self.s_noise * following * math.sqrt(-math.expm1(-2 * self.eta * h))
                    x = x + spread * noise.between(x, sigma, following)
                last_h = h
            previous = denoised
            yield x
