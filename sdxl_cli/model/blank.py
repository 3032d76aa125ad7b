"""Networks without values, which are to be given theirs from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_METHODS = frozenset({"normal_", "uniform_", "fill_", "zero_", "triu_"})


@contextmanager
def blank() -> Iterator[None]:
    """Within it, modules are built on the meta device and nobody chooses starting values for them.

    A tensor on the meta device has none anyway. But for some of the functions that would choose them, torch has
    Python code only, which imports its compiler and sympy first: more than a second.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills tensors on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or getattr(func, "__name__", "") in _METHODS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
