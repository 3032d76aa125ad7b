"""Linear layers on a CPU whose weights already lie in memory the way oneDNN multiplies them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sdxl_kernels.processor import CPUINFO, cpu_multiplies_bf16

ROWS = 2048
"""The number of rows that a layout is chosen for: a guided step's tokens where most of the time goes."""


def prepacking_exists() -> bool:
    """Whether this build of torch has oneDNN's operations for it. torch's own compiler uses them."""
    return bool(torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def prepacking_pays(dtype: torch.dtype, cpuinfo: Path = CPUINFO) -> bool:
    """Whether products of this precision are known to be faster with it on this processor.

    In bf16 they are where it has instructions for it (3 to 7 %, measured with AVX512_BF16). In fp32 they are on AMD's
    with AVX-512 (8 to 33 %), where torch otherwise takes Intel's library; with AVX2 they were slower (0.85x).
    """
    if not prepacking_exists():
        return False
    if dtype == torch.bfloat16:
        return cpu_multiplies_bf16()
    if dtype != torch.float32 or not torch.cpu._is_avx512_supported():
        return False
    try:
        return "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def prepack(weight: Tensor) -> Tensor:
    """A copy in oneDNN's own layout.

    Args:
        weight: [D, C], on the CPU.

    Returns:
        A tensor that only :func:`prepacked_linear` can read.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def prepacked_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weightᵀ + bias``; without gradients.

    Args:
        x: [..., C].
        packed: from :func:`prepack`.
        bias: [D], or none.

    Returns:
        [..., D].
    """
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
