"""The linear multistep method of k-diffusion (Adams-Bashforth with steps of any length)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, option, pairs
from sdxl_cli.diffusion.samplers.polynomials import lagrange


@dataclass(frozen=True, kw_only=True)
class LMS(Sampler):
    """Integrates the polynomial in sigma through the last slopes. The first steps know fewer of them."""

    name: str = "lms"
    label: str = "LMS"
    grid: str = "normal"
    order = 4

    solver_order: int = option(4, "slopes remembered, which is the order", low=1, high=4)

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        past: deque[tuple[float, Tensor]] = deque(maxlen=self.solver_order)
        for sigma, following in pairs(sigmas):
            past.appendleft((sigma, (x - denoise(x, sigma)) / sigma))
            # in units from the start of the step: differences of large powers would cost digits
            bases = lagrange([level - sigma for level, _ in past])
            for basis, (_, slope) in zip(bases, past, strict=True):
                x = x + float(basis.integ()(following - sigma)) * slope
            yield x
