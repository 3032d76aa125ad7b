"""What a sampler is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""(x, sigma) -> denoised x."""


class Noise(Protocol):
    """Random numbers for samplers that add noise; every image of a batch has its own."""

    def fresh(self, x: Tensor) -> Tensor:
        """Standard normal noise like x, another at every call."""
        ...

    def between(self, x: Tensor, sigma: float, following: float) -> Tensor:
        """Noise like x of unit variance: a Brownian path's increment between two levels, the same at every call."""
        ...


class Sampler(Protocol):
    """Follows the probability flow from the first noise level to the last."""

    name: str
    """As typed: ``--sampler euler``."""
    label: str
    """As A1111 writes it in a picture's metadata."""

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """Yield x after every step.

        Args:
            denoise: D(x; sigma).
            x: start, at noise level ``sigmas[0]`` [B, C, h, w].
            sigmas: descending noise levels [n + 1]; the last is 0, or where another model takes over.
            noise: used by stochastic samplers only.
        """
        ...
