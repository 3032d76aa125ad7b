"""What of a picture is repainted: masks as people draw them, in pixels and in latents."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from einops import reduce
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.picture import Pixels, read_pixels
from sdxl_cli.generation.sizes import Size, format_size

Mask = NDArray[np.bool_]
"""[H, W]: what is repainted."""

Share = NDArray[np.float32]
"""[H, W], 0 … 1: how much of a pixel is the new picture's. 0 is the old pixel, bit by bit."""

BLACK = (0, 0, 0)
_HALF = 128
"""Brightness from which a mask is white. Cut there as in diffusers: what a JPEG adds to black stays black."""
_SAME_RATIO = 0.01


def read_mask(path: Path, size: Size, *, invert: bool = False) -> Mask:
    """A mask file: white is repainted, transparent is black.

    A mask of another size but the picture's own shape is scaled, without new shades.

    Args:
        path: a picture file; colours count by their brightness.
        size: (height, width) of the picture it belongs to.
        invert: whether black is what is repainted.

    Raises:
        FileError: it is missing or no picture.
        UsageError: it has another shape than the picture, or nothing in it is to be repainted.
    """
    image = Image.fromarray(read_pixels(path, background=BLACK)).convert("L")
    height, width = size
    if abs(math.log(image.width / image.height * height / width)) > _SAME_RATIO:
        raise UsageError(
            f"--mask {path}: is {image.width}x{image.height}, the picture {format_size(size)}; "
            "draw it at the picture's size"
        )
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.NEAREST)
    mask: Mask = (np.asarray(image) >= _HALF) ^ invert
    if not mask.any():
        raise UsageError(
            f"--mask {path}: nothing in it is {'black' if invert else 'white'}, so nothing would be repainted"
        )
    return mask


def bounds(mask: Mask) -> tuple[int, int, int, int]:
    """The smallest (top, left, bottom, right) with all that is repainted; the last two are outside."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def feather(mask: Mask, blur: int) -> Share:
    """Let the new picture fade in over the outermost ``blur`` pixels inside the mask.

    Only inside: a mask that is softened on both sides would change what nobody gave free. A place that is less than
    ``2 · blur`` wide still reaches its full share where it is widest in the whole mask.
    """
    depth = np.zeros(mask.shape, np.float32)
    # beyond the picture's edge there is nothing to fade into
    inside = Image.fromarray(np.pad(mask, blur, mode="edge").astype(np.uint8) * 255)
    keep = (slice(blur, -blur or None),) * 2
    for _ in range(blur + 1):
        level = np.asarray(inside)[keep] > 0
        if not level.any():
            break
        depth += level
        inside = inside.filter(ImageFilter.MinFilter(3))
    return depth / depth.max()


def to_latent(mask: Mask, factor: int) -> Tensor:
    """[H, W] in pixels to [1, 1, H / factor, W / factor] of 0 and 1: a latent with any pixel to repaint is 1."""
    blocks = reduce(mask, "(h a) (w b) -> h w", "max", a=factor, b=factor)
    return torch.from_numpy(blocks.astype(np.float32))[None, None]


def blend(new: Pixels, old: Pixels, share: Share, *, reach: float) -> Pixels:
    """Lay a new picture over an old one.

    An autoencoder does not give back the colours it was shown to the last digit, which at a sharp edge is a seam.
    So the difference between old and new just outside of what is repainted is continued a few pixels inwards,
    fading, and taken off the new picture.

    Args:
        new: [H, W, 3] uint8, also where it is not to be seen.
        old: [H, W, 3] uint8.
        share: how much of each pixel is new. Where it is 0 the result is ``old``, bit by bit.
        reach: how far inwards the colours are matched, as the standard deviation of a Gaussian in pixels.
    """
    kept = torch.from_numpy(share == 0)[None, None].float()
    off = torch.from_numpy(old.astype(np.float32) - new.astype(np.float32)).permute(2, 0, 1)[None]
    near = _blurred(kept, reach)
    # over a straight edge half of what is near is kept: full strength there, none further in
    strength = (2 * near).clamp(max=1) / near.clamp(min=1e-6)
    correction = (_blurred(off * kept, reach) * strength)[0].permute(1, 2, 0).numpy()
    mixed = old + share[..., None] * (new + correction - old)
    levels = mixed.clip(0, 255).round().astype(np.uint8)
    return np.where(share[..., None] == 0, old, levels)


def _blurred(values: Tensor, deviation: float) -> Tensor:
    """[B, C, H, W] with a Gaussian; beyond the edges everything is 0."""
    radius = math.ceil(3 * deviation)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / deviation) ** 2)
    kernel = (kernel / kernel.sum()).repeat(values.shape[1], 1, 1, 1)
    channels = values.shape[1]
    rows = functional.conv2d(values, kernel, padding=(0, radius), groups=channels)
    return functional.conv2d(rows, kernel.transpose(2, 3), padding=(radius, 0), groups=channels)
