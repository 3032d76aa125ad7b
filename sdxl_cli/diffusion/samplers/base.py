"""What a sampler is, and what many of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
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


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Follows the probability flow, or a stochastic equation with the same marginals, down the noise levels."""

    name: str
    """As typed: ``--sampler euler``."""
    label: str
    """As A1111 writes it in a picture's metadata."""
    grid: str
    """The scheduler taken for ``--scheduler auto``: A1111's choice where it has one, else the original's grid."""

    order: ClassVar[int]
    """Of convergence to the probability flow, without added noise."""
    evaluations: ClassVar[int] = 1
    """Of the network a step; one fewer in a step to 0."""
    randomness: ClassVar[Literal["none", "fresh", "path"]] = "none"
    """Where added noise comes from: nowhere, another draw each time, or a Brownian path over the levels."""
    skips_penultimate: ClassVar[bool] = False
    """Takes n + 1 levels of a grid and leaves out the last above 0, as A1111 and ComfyUI agree to do."""

    @abstractmethod
    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """Yield x after every step.

        Args:
            denoise: D(x; sigma).
            x: start, at noise level ``sigmas[0]`` [B, C, h, w].
            sigmas: descending noise levels [n + 1]; the last is 0, or where another model takes over.
            noise: used by stochastic samplers only.
        """

    def levels(self, sigmas: Tensor) -> list[float]:
        """The noise levels at which it will look, in order; they depend on ``sigmas`` alone."""
        found: list[float] = []

        def look(x: Tensor, sigma: float) -> Tensor:
            found.append(sigma)
            return x

        for _ in self.steps(look, torch.zeros(1, 1, 1, 1), sigmas, _Silence()):
            pass
        return found


class _Silence:
    """Noise of no strength."""

    def fresh(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def between(self, x: Tensor, sigma: float, following: float) -> Tensor:
        return torch.zeros_like(x)


def option(
    default: Any, text: str, *, low: float = 0.0, high: float = float("inf"), among: tuple[str, ...] = ()
) -> Any:
    """A field that a user may set.

    Args:
        default: its value; says its type.
        text: what it is, in a few words.
        low: smallest value of a number.
        high: largest.
        among: the values of a word.
    """
    return field(default=default, metadata={"text": text, "low": low, "high": high, "among": among})


def pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """Where each step begins and ends."""
    levels: list[float] = sigmas.tolist()
    return list(zip(levels, levels[1:], strict=False))


def moved(x: Tensor, denoised: Tensor, sigma: float, target: float) -> Tensor:
    """x at level ``target`` when D stays as it is: D + (target / sigma) (x - D), Euler's step."""
    return x + (target - sigma) * ((x - denoised) / sigma)
