"""Looking on while pictures are made: which stage runs, and what the picture would be after each step.

Whoever is told how things go (the pipeline's ``Reporter``) may also be an :class:`Observer`; timings and previews
are. The stages are ``load``, ``text``, ``unet``, ``vae`` and ``save``; one inside another counts for itself alone.
Pictures are written behind the next ones (``behind.py``): ``save`` is what is waited for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step that has just been made."""

    denoised: Tensor
    """What the network takes the clean latents for, scaled, fp32 [B, z, h, w]."""
    who: str
    """``base`` or ``refiner``."""
    done: int
    """Steps made so far, 1 … ``total``, by all experts together."""
    total: int
    x: Tensor
    """The noisy latents that ``denoised`` was made of, like it in size; with x = clean + sigma · noise."""
    sigma: float
    """Their noise level. Samplers that look twice in a step show the second look."""

    @property
    def eps(self) -> Tensor:
        """The noise that the network takes to be in ``x``, about standard normal [B, z, h, w]."""
        return (self.x - self.denoised) / self.sigma


@runtime_checkable
class Observer(Protocol):
    """Sees the inside of a run."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Entered when a stage begins, left when it ends."""
        ...

    def step(self, step: Step) -> None:
        """Called after every denoising step, inside the stage ``unet``."""
        ...


def stage(report: object, name: str) -> AbstractContextManager[None]:
    """The stage ``name`` as ``report`` sees it; nothing when it does not look."""
    return report.stage(name) if isinstance(report, Observer) else nullcontext()


def step(report: object, made: Step) -> None:
    """Tell ``report`` of a step, if it looks."""
    if isinstance(report, Observer):
        report.step(made)
