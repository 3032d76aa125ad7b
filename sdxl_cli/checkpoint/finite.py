"""NaN and infinity in stored numbers, found by their bits: no cast, and as fast for eight bits as for sixty-four."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 20
"""Elements looked at at a time."""


@dataclass(frozen=True, slots=True)
class _Bits:
    """Where a floating-point format keeps its exponent and its mantissa."""

    integer: torch.dtype
    exponent: int
    mantissa: int


_FORMATS: dict[torch.dtype, _Bits] = {
    torch.float64: _Bits(torch.int64, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF),
    torch.float32: _Bits(torch.int32, 0x7F80_0000, 0x007F_FFFF),
    torch.float16: _Bits(torch.int16, 0x7C00, 0x03FF),
    torch.bfloat16: _Bits(torch.int16, 0x7F80, 0x007F),
    torch.float8_e5m2: _Bits(torch.uint8, 0x7C, 0x03),
    # no infinity, and one NaN per sign: all seven bits set (Micikevicius et al. 2022, arXiv 2209.05433, Table 1)
    torch.float8_e4m3fn: _Bits(torch.uint8, 0x7F, 0x7F),
}
"""IEEE 754 and its likes: an exponent of ones is NaN when the mantissa is not zero, else infinity."""


def count_non_finite(tensor: Tensor) -> tuple[int, int]:
    """How many elements are NaN and how many infinite; (0, 0) for integers and booleans."""
    bits = _FORMATS.get(tensor.dtype)
    if bits is None or tensor.numel() == 0:
        return 0, 0
    nan = total = 0
    # in pieces: the masks of a whole table of embeddings would take more memory than the table
    flat = tensor.contiguous().reshape(-1).view(bits.integer)
    for start in range(0, len(flat), _PIECE):
        numbers = flat[start : start + _PIECE]
        special = (numbers & bits.exponent) == bits.exponent
        if special.any():
            total += int(special.sum())
            nan += int(((numbers & bits.mantissa) != 0)[special].sum())
    return nan, total - nan
