"""How many bytes of tensors are alive at the same time; on the meta device, where they take none themselves."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that come into being inside, and takes off those that go.

    What was there before is not counted, and what a kernel uses inside itself is not seen: cuDNN's workspaces, say,
    come on top.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at what it made."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # optimizers read single numbers; which ones makes no difference to sizes
        for storage in _storages((args, kwargs)):
            self._know(storage, 0)  # what nobody made inside was there before
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            self._know(storage, storage.nbytes())
        return made

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
