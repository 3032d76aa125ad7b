"""UniPC (arXiv 2302.04867), predicting the clean latent, multistep, with a corrector that costs no evaluation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise, Sampler, option, pairs

Past = deque[tuple[float, Tensor]]
"""(level, D there), the latest first."""


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    """Each new D first corrects the x it was computed at, then predicts the next x from the corrected one.

    The order rises with what is remembered and, towards 0, falls with the steps that are left (diffusers).
    """

    name: str = "unipc"
    label: str = "UniPC"
    grid: str = "sgm"
    order = 3  # the corrector adds one

    solver_type: str = option("bh2", "of B(h): bh1 is h, bh2 is e^h - 1", among=("bh1", "bh2"))
    solver_order: int = option(2, "of the predictor", low=1, high=3)

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        past: Past = deque(maxlen=self.solver_order)
        steps = pairs(sigmas)
        to_zero = steps[-1][1] == 0
        start, order = x, 0
        for index, (sigma, following) in enumerate(steps):
            denoised = denoise(x, sigma)
            if index:
                x = self._update(start, past, order, sigma, denoised)
            past.appendleft((sigma, denoised))
            left = len(steps) - index if to_zero else self.solver_order
            order = min(self.solver_order, len(past), left)
            start, x = x, self._update(x, past, order, following) if following > 0 else denoised
            yield x

    def _update(
        self, x: Tensor, past: Past, order: int, target: float, there: Tensor | None = None
    ) -> Tensor:
        """x at ``target``, from x at the latest level of ``past`` (UniP; with D at the target ``there``: UniC)."""
        sigma, latest = past[0]
        h = math.log(sigma / target)
        points = [(math.log(sigma / level) / h, denoised) for level, denoised in list(past)[1:order]]
        if there is not None:
            points.append((1.0, there))
        x = (target / sigma) * x - math.expm1(-h) * latest
        if not points:
            return x
        scale = -h if self.solver_type == "bh1" else math.expm1(-h)
        for weight, (place, denoised) in zip(
            _weights([place for place, _ in points], h, scale), points, strict=True
        ):
            x = x - (scale * weight / place) * (denoised - latest)
        return x


def _weights(places: Sequence[float], h: float, scale: float) -> list[float]:
    """The rho of the paper's eq. 5: with them, polynomials up to the number of places are integrated exactly.

    One place gets 1/2 whatever h is, as the paper does for the first and second order.
    """
    if len(places) == 1:
        return [0.5]
    moments = []
    phi = math.expm1(-h) / -h - 1
    for k in range(1, len(places) + 1):
        moments.append(phi * math.factorial(k) / scale)
        phi = phi / -h - 1 / math.factorial(k + 1)
    powers = np.vander(np.array(places), increasing=True).T
    weights: list[float] = np.linalg.solve(powers, np.array(moments)).tolist()
    return weights
