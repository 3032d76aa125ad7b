"""The gated feed-forward projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GEGLU (arXiv 2002.05202): value * gelu(gate), with the exact (erf) GELU.

    Args:
        x: [..., C].
        weight: [2·D, C]; the first D rows make the value, the last D the gate.
        bias: [2·D].

    Returns:
        [..., D].
    """
    return gated(F.linear(x, weight, bias))


def gated(projected: Tensor) -> Tensor:
    """The second half of :func:`geglu`: [..., 2·D] -> [..., D], value * gelu(gate)."""
    if torch.is_grad_enabled() and projected.requires_grad:
        return _Gated.apply(projected)
    value, gate = projected.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


class _Gated(torch.autograd.Function):
    """value * gelu(gate), which keeps neither of the factors apart: gelu(gate) is computed again."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        value, gate = projected.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        value, gate = projected.chunk(2, dim=-1)
        out = torch.empty_like(projected)
        of_value, of_gate = out.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=of_value)
        of_gate.copy_(torch.ops.aten.gelu_backward(grad * value, gate))
        return out
