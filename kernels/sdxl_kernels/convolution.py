"""The resampling convolutions of the U-Net and the VAE."""

from __future__ import annotations

import torch
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
    doubled = (2 * x.shape[2], 2 * x.shape[3])
    size = size or doubled
    if size == doubled:
        return upsample_conv_subpixel(x, weight, bias)
    return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)


def upsample_conv_subpixel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as :func:`upsample_conv` to the double size, with 4/9 of its multiplications.

    Of the three rows that a doubled image's row is made from, two are the same row of ``x``. So each of the four
    pixels that come from one is a 2x2 convolution of ``x``, with the coinciding taps added up beforehand.

    Args and result as for :func:`upsample_conv`.
    """
    batch, _, height, width = x.shape
    four = F.conv2d(x, subpixel_weight(weight), None if bias is None else bias.repeat(4), padding=1)
    channels = len(weight)
    nhwc = four.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    out = torch.empty(
        (batch, channels, 2 * height, 2 * width), dtype=four.dtype, device=four.device, memory_format=layout
    )
    for index, part in enumerate(torch.split(four, channels, dim=1)):
        down, right = divmod(index, 2)
        out[:, :, down::2, right::2] = part[:, :, down : down + height, right : right + width]
    return out


def subpixel_weight(weight: Tensor) -> Tensor:
    """Four 2x2 kernels for one 3x3 kernel.

    The upper pixel of two sees the row above and its own (taps 0 | 1 + 2), the lower one its own and the row below
    (taps 0 + 1 | 2); columns alike.

    Args:
        weight: [D, C, 3, 3].

    Returns:
        [4·D, C, 2, 2]: upper left, upper right, lower left, lower right. Channels are last in memory if they are in
        ``weight``.
    """
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        return _quarters(weight.permute(0, 2, 3, 1), (1, 2)).permute(0, 3, 1, 2)
    return _quarters(weight, (2, 3))


def _quarters(weight: Tensor, dims: tuple[int, int]) -> Tensor:
    rows = [_halves(weight, dims[0], first) for first in (1, 2)]
    return torch.cat([_halves(row, dims[1], first) for row in rows for first in (1, 2)])


def _halves(weight: Tensor, dim: int, first: int) -> Tensor:
    """Three taps along ``dim`` as two: the sum of the ``first`` ones, and the sum of the others."""
    parts = torch.split(weight, [first, 3 - first], dim=dim)
    sums = [part if part.shape[dim] == 1 else part.sum(dim, keepdim=True) for part in parts]
    return torch.cat(sums, dim=dim)


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
