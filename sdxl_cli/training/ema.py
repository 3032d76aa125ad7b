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
            name: p.detach().to(device or p.device, _precision(p), copy=True)
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
        pairs = [(local(value), local(parameters[name].detach())) for name, value in shadow.items()]
        if all(value.device == p.device and value.dtype == p.dtype for value, p in pairs):
            torch._foreach_lerp_([value for value, _ in pairs], [p for _, p in pairs], 1 - decay)
            return
        for value, p in pairs:  # one by one, as each needs a copy
            value.lerp_(p.to(value.device, value.dtype), 1 - decay)


def _precision(parameter: Tensor) -> torch.dtype:
    """fp32 for bf16: an average moves by less than bf16 tells apart."""
    return torch.float32 if parameter.dtype == torch.bfloat16 else parameter.dtype


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
