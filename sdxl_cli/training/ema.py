"""Exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sdxl_cli.training.shards import local


class EMA:
    """shadow -= (1 - d) (shadow - p) with d = min(decay, (1 + n) / (10 + n)), n from 1 (facts: sgm ema.py)."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: float,
        *,
        every: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Args:
        parameters: by name; the average begins as a copy of them.
        decay: the d that is reached in the end.
        every: steps between updates; each one then decays by the product of its steps' d.
        device: where the average is kept; None keeps it with the parameters.
        """
        self.decay, self.every = decay, every
        self.updates = 0
        """Steps seen; the average is ``updates % every`` of them behind."""
        self.shadow = {
            name: p.detach().to(device or p.device, copy=True, memory_format=torch.preserve_format)
            for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the shadow towards the parameters, after every optimizer step."""
        self.updates += 1
        if self.updates % self.every == 0:
            self._move(self.shadow, parameters, self.every)

    @torch.no_grad()
    def current(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The average with the last ``updates % every`` steps in it; what goes on is not touched."""
        behind = self.updates % self.every
        if not behind:
            return dict(self.shadow)
        moved = {name: value.clone() for name, value in self.shadow.items()}
        self._move(moved, parameters, behind)
        return moved

    def _move(self, shadow: Mapping[str, Tensor], parameters: Mapping[str, Tensor], steps: int) -> None:
        decay = math.prod(
            min(self.decay, (1 + n) / (10 + n)) for n in range(self.updates - steps + 1, self.updates + 1)
        )
        values = [local(value) for value in shadow.values()]
        targets = [local(parameters[name].detach()).to(value.device) for name, value in shadow.items()]
        torch._foreach_lerp_(values, targets, 1 - decay)


@contextmanager
def swapped_in(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the parameters have these values for a while; their own wait on the CPU."""
    with torch.no_grad():
        own = {name: parameters[name].detach().to("cpu", copy=True) for name in values}
        for name, value in values.items():
            parameters[name].copy_(value)
        try:
            yield
        finally:
            for name, value in own.items():
                parameters[name].copy_(value)
