"""DEIS (arXiv 2204.13902), the variant tAB-DEIS with polynomials in log rho, as in diffusers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from numpy.polynomial import Polynomial
from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, moved, option, pairs
from sdxl_cli.diffusion.samplers.polynomials import lagrange


@dataclass(frozen=True, kw_only=True)
class DEIS(Sampler):
    """Integrates over sigma the polynomial in log sigma through the last noise predictions (x - D) / sigma.

    The rho of the paper is sigma in the scaling clean + sigma · noise. log 0 does not exist, so the step to 0
    knows one prediction only.
    """

    name: str = "deis"
    label: str = "DEIS"
    grid: str = "sgm"
    order = 2

    solver_order: int = option(2, "predictions remembered, which is the order", low=1, high=3)

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        past: deque[tuple[float, Tensor]] = deque(maxlen=self.solver_order)
        for sigma, following in pairs(sigmas):
            denoised = denoise(x, sigma)
            past.appendleft((sigma, (x - denoised) / sigma))
            if following == 0:
                x = moved(x, denoised, sigma, following)
            else:
                end = math.log(following / sigma)
                for basis, (_, eps) in zip(
                    lagrange([math.log(level / sigma) for level, _ in past]), past, strict=True
                ):
                    x = x + sigma * _times_exponential(basis, end) * eps
            yield x


def _times_exponential(polynomial: Polynomial, end: float) -> float:
    """The integral of p(u) e^u from 0 to ``end``: e^u (p - p' + p'' - …)."""
    antiderivative, derivative, sign = Polynomial([0.0]), polynomial, 1.0
    for _ in range(polynomial.degree() + 1):
        antiderivative, derivative, sign = antiderivative + sign * derivative, derivative.deriv(), -sign
    return float(math.exp(end) * antiderivative(end) - antiderivative(0.0))
