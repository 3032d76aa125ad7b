"""The resampling convolutions of the U-Net and the VAE."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsample_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int] | None = None
) -> Tensor:
    """Nearest-neighbour doubling, then a 3x3 convolution with padding 1.

    Args:
        x: [B, C, H, W].
        weight: [D, C, 3, 3].
        bias: [D], or none.
        size: (height, width) to make instead, for what was an odd number before it was halved.

    Returns:
        [B, D, 2·H, 2·W], or [B, D, *size].
    """
    size = size or (2 * x.shape[2], 2 * x.shape[3])
    return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)


def downsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution with stride 2 and padding 1 on every side (the U-Net's).

    Args:
        x: [B, C, H, W].
        weight: [D, C, 3, 3].
        bias: [D], or none.

    Returns:
        [B, D, ceil(H/2), ceil(W/2)].
    """
    return F.conv2d(x, weight, bias, stride=2, padding=1)


def downsample_conv_asymmetric(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution with stride 2, padded by one on the right and below only (the VAE's).

    Args and result as for :func:`downsample_conv`, with even H and W.
    """
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
