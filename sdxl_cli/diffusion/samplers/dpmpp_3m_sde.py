"""DPM-Solver++(3M), for the stochastic equation or without noise (the form is k-diffusion's)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, option, pairs


@dataclass(frozen=True, kw_only=True)
class DPMpp3MSDE(Sampler):
    """Multistep with three denoised latents in H = (1 + eta) · Δ(-log sigma); the first steps have lower orders.

    With eta = 0 it is the multistep DPM-Solver++ that is called third order (arXiv 2211.01095 and its authors' code).
    Its last term has half the weight that a Taylor series gives it, so it converges like a method of second order,
    with a smaller error. It is left so, because this is the sampler people know by that name.
    """

    name: str = "dpmpp_3m_sde"
    label: str = "DPM++ 3M SDE"
    grid: str = "exponential"
    order = 2
    randomness = "path"

    eta: float = option(1.0, "0 follows the probability flow, 1 the reverse diffusion")
    s_noise: float = option(1.0, "how strong the noise is")

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        past: deque[tuple[float, Tensor]] = deque(maxlen=2)
        for sigma, following in pairs(sigmas):
            denoised = denoise(x, sigma)
            if following == 0:
                x = denoised
            else:
                h = math.log(sigma / following)
                decay = (1 + self.eta) * h
                x = math.exp(-decay) * x - math.expm1(-decay) * denoised + self._bend(denoised, past, h)
                if self.eta:
                    spread = self.s_noise * following * math.sqrt(-math.expm1(-2 * self.eta * h))
                    x = x + spread * noise.between(x, sigma, following)
                past.appendleft((h, denoised))
            yield x

    def _bend(self, denoised: Tensor, past: deque[tuple[float, Tensor]], h: float) -> Tensor | float:
        """What the derivatives of D along the way add, by divided differences in units of this step."""
        if not past:
            return 0.0
        decay = (1 + self.eta) * h
        phi_2 = math.expm1(-decay) / decay + 1
        (h_1, before), ratio = past[0], past[0][0] / h
        first = (denoised - before) / ratio
        if len(past) == 1:
            return phi_2 * first
        h_2, long_before = past[1]
        phi_3 = phi_2 / decay - 0.5
        second = (first - (before - long_before) / (h_2 / h)) / ((h_1 + h_2) / h)
        return phi_2 * (first + ratio * second) - phi_3 * second
