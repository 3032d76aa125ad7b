"""NaN and infinity stop a run where they appear; nothing is patched up or painted black."""

from __future__ import annotations

import torch
from torch import Tensor

from sdxl_cli.errors import NumericError


def require_finite(values: Tensor, stage: str, dtype: torch.dtype, flag: str) -> None:
    """Stop when a network gave NaN or infinity.

    Args:
        values: what it gave.
        stage: who gave it, and when: ``"the UNet, step 3 of 30 (t=899)"``.
        dtype: the network's precision.
        flag: what chooses that precision on the command line.

    Raises:
        NumericError: a value is not finite.
    """
    if bool(torch.isfinite(values).all()):
        return
    if dtype == torch.float32:
        advice = "its weights are damaged or do not belong together; try the original file"
    else:
        advice = f"try {flag} fp32" if dtype == torch.bfloat16 else f"fp16 overflows: try {flag} bf16 or fp32"
    raise NumericError(f"{stage}: gave NaN or infinity in {str(dtype).removeprefix('torch.')}; {advice}")
