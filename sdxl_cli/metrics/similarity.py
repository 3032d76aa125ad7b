"""How alike two pictures are: PSNR and SSIM, for every pair on its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
"""Side of SSIM's Gaussian window and its deviation, in pixels (Wang et al. 2004, section III.C)."""
_K1, _K2 = 0.01, 0.03
_RANGE = 2.0
"""Of values in -1 … 1."""


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every pair, 10 log10(range² / mean squared error), in dB.

    Args:
        images, others: [B, 3, H, W] in -1 … 1; what is beyond that range is cut off.

    Returns:
        [B], float64. Infinity for pictures that are the same, NaN where one of them has NaN.
    """
    error = (_exact(images) - _exact(others)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(_RANGE**2 / error)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of every pair (Wang et al. 2004): the mean over the colours and over all positions.

    Pictures are mirrored at their borders for the windows there, as torchmetrics does; the authors' program and
    scikit-image leave those positions out, which changes the third digit at 256 pixels.

    Args:
        images, others: [B, C, H, W] in -1 … 1, sides of at least 11 pixels; what is beyond that range is cut off.

    Returns:
        [B], float64, at most 1. NaN where one of them has NaN.

    Raises:
        ValueError: a side is smaller than the window.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs sides of {WINDOW} pixels, not {images.shape[-1]}x{images.shape[-2]}")
    x, y = _exact(images), _exact(others)
    x, y = (F.pad(part, [WINDOW // 2] * 4, mode="reflect") for part in (x, y))
    mean_x, mean_y, square_x, square_y, product = (_blurred(part) for part in (x, y, x * x, y * y, x * y))
    variance_x, variance_y = square_x - mean_x.square(), square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    return (above / below).flatten(1).mean(dim=1)


def _exact(images: Tensor) -> Tensor:
    """0 … 2, as SSIM compares luminance, which begins at black; in float64 where the device has it: variances are
    differences of nearly equal numbers.
    """
    wide = torch.float32 if images.device.type == "mps" else torch.float64
    return images.to(wide).clamp(-1, 1) + 1


def _blurred(images: Tensor) -> Tensor:
    """Gaussian means [B, C, H - 10, W - 10] of [B, C, H, W]."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, WINDOW)
    # the window is separable: one pass along each side
    rows = F.conv2d(images, weights, groups=images.shape[1])
    return F.conv2d(rows, weights.mT.reshape(-1, 1, WINDOW, 1), groups=images.shape[1])
