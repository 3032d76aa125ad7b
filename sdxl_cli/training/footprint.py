"""How many bytes a training step needs, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes of a training step on its device."""

    weights: int
    """Of all networks there, trained or not."""
    optimizer: int
    average: int
    activations: int
    """Kept at the end of the forward pass, for the backward one."""
    step: int
    """The most that is there at once of what begins and ends with a step: activations, gradients, what is at hand."""

    @property
    def total(self) -> int:
        """The most at once in all."""
        return self.weights + self.optimizer + self.average + self.step


def resident(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
