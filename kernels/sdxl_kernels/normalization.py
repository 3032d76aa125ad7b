"""Group normalisation, alone and followed by SiLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sdxl_kernels.cuda_norm import fused_norm


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each group of channels of each image to mean 0, variance 1, then scale and shift.

    Args:
        x: [B, C, H, W]; statistics are accumulated in fp32 whatever its dtype.
        groups: number of groups; C is a multiple of it.
        weight: [C].
        bias: [C].
        eps: added to the variance.
    """
    fused = fused_norm(x, groups, weight, bias, eps, silu=False)
    return F.group_norm(x, groups, weight, bias, eps) if fused is None else fused


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``silu(group_norm(x))``, the pair in front of every convolution of the U-Net and the VAE.

    Arguments as for :func:`group_norm`.
    """
    fused = fused_norm(x, groups, weight, bias, eps, silu=True)
    if fused is not None:
        return fused
    normalized = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(normalized, inplace=not normalized.requires_grad)
