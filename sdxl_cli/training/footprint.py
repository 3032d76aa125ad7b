"""How many bytes a step needs, counted on the meta device, where tensors have sizes and no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that come into being, and takes off those that go."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """``known`` were there before and are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # optimizers read single numbers; which ones makes no difference to sizes
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


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
