"""Rounding to bf16 that keeps small updates, on average."""

from __future__ import annotations

import torch
from torch import Tensor

LOW_BITS = 16
"""Bits of an fp32 that a bf16 lacks."""


@torch.no_grad()
def round_into(target: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
    """Write fp32 numbers to bf16 ones, up or down with a chance in proportion to the distance.

    The mean of many roundings is the number itself. To the nearest, a weight w would never move by less than w / 512:
    with AdamW's steps of the size of the learning rate, most weights of a fine-tune stood still
    (arXiv 2010.06192, section 3).

    Args:
        target: bf16, changed in place.
        value: fp32, of the same shape; used up.
        generator: of the chances; on the device of both. None only on the meta device, which has no numbers.
    """
    bits = value.view(torch.int32)
    bits += torch.randint(
        0, 1 << LOW_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    bits &= -(1 << LOW_BITS)
    target.copy_(value)
