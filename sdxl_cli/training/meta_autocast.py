"""torch.autocast for the meta device, which has none of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOWERED = frozenset(
    {
        F.linear,
        torch.conv2d,
        F.conv2d,
        torch.matmul,
        torch.bmm,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
    }
)
RAISED = frozenset({F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm, F.softmax})
"""What CUDA's autocast computes in 16 and in 32 bits, of the operations of our networks
(docs.pytorch.org/docs/stable/amp.html, "CUDA Op-Specific Behavior")."""


class MetaAutocast(TorchFunctionMode):
    """Casts as CUDA's autocast does.

    The casts of trained weights are kept to the end of the context, and beyond as long as the backward pass needs them.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.casts: dict[Tensor, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        """Forget the casts, as torch does at the end of its context."""
        self.casts.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Cast the operation's tensors as autocast does."""
        if func in LOWERED or func in RAISED:
            cast = self._lower if func in LOWERED else self._raise
            args = [cast(arg) for arg in args]
            kwargs = {name: cast(arg) for name, arg in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if value not in self.casts:
            self.casts[value] = value.to(self.dtype)
        return self.casts[value]

    def _raise(self, value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in what tensors are; on the meta device the sizes of a few vectors are let be."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
