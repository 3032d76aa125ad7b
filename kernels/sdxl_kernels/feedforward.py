"""The gated feed-forward projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GEGLU (arXiv 2002.05202): value * gelu(gate), with the exact (erf) GELU.

    Args:
        x: [..., C].
        weight: [2·D, C]; the first D rows make the value, the last D the gate.
        bias: [2·D].

    Returns:
        [..., D].
    """
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    if torch.is_grad_enabled():
        return value * F.gelu(gate)
    return F.gelu(gate).mul_(value)
