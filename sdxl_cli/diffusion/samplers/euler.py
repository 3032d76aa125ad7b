"""Euler's method (arXiv 2206.00364, Algorithm 1 without the correction; the original demo's sampler)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Denoise, Noise


class Euler:
    """dx/dsigma = (x - D) / sigma, first order."""

    name = "euler"
    label = "Euler"

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """See :class:`~sdxl_cli.diffusion.samplers.base.Sampler`."""
        levels = sigmas.tolist()
        for sigma, following in zip(levels, levels[1:], strict=False):
            slope = (x - denoise(x, sigma)) / sigma
            x = x + (following - sigma) * slope
            yield x
