"""Pictures of what was measured: originals beside reconstructions, latent channels as maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sdxl_cli.checkpoint.atomic import atomic_write

Pixels = NDArray[np.uint8]
"""RGB [H, W, 3]."""

AMPLIFIED = 4
"""Differences are shown this many times as large."""
MAP_RANGE = 3.0
"""Latents times the scale factor that are shown in full red, and minus that in full blue."""
ROWS = 12
"""Strips on a sheet."""
NOT_FINITE = (0, 200, 0)
"""What a map shows NaN and infinity as: green, which no other value is."""

_GAP, _TEXT, _MARGIN = 8, 18, 12
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Strip:
    """Pictures side by side, with a line of text above."""

    label: str
    cells: tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """Strips of one kind below each other."""

    name: str
    """Of its file, without ending."""
    title: str
    says: str
    """What there is to see."""
    titles: tuple[str, ...]
    """Over the columns."""
    strips: tuple[Strip, ...]

    @classmethod
    def of(cls, kind: str, strips: Sequence[Strip], first: str, second: str = "") -> Sheet:
        """A sheet of one of the usual kinds; ``first`` and ``second`` are what is looked at."""
        title, says, titles = _KINDS[kind]
        named = tuple(text.format(first=first, second=second) for text in titles)
        if kind == "channels":
            named = tuple(f"channel {index}" for index in range(len(strips[0].cells)))
        return cls(kind, title, says, named, tuple(strips))

    def draw(self) -> Image.Image:
        """All of it as one picture."""
        return sheet(self.titles, self.strips)


_KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "reconstructions": (
        "Reconstructions",
        f"The worst {ROWS} by PSNR, encoded to the mean of the posterior and decoded.",
        ("original", "reconstruction", f"difference x {AMPLIFIED}"),
    ),
    "versus": (
        "Two autoencoders",
        "The same pictures through both.",
        ("original", "{first}", "{second}", f"{{first}}: difference x {AMPLIFIED}", "{second}: the same"),
    ),
    "decoded": (
        "What the latents show",
        "Decoded, and as previews show them: by a linear map of the channels.",
        ("decoded", "linear preview"),
    ),
    "channels": (
        "Channels",
        f"Latents times the scale factor: blue below 0, white at 0, red above, full at {MAP_RANGE:g}; green is NaN "
        "or infinity.",
        (),
    ),
    "steps": (
        "What the network takes for the picture",
        "Step by step: the denoised latents decoded, and by the linear map that previews use.",
        ("denoised, decoded", "denoised, linear preview", "noisy latents, linear preview"),
    ),
}


def comparison(label: str, image: Tensor, other: Tensor, side: int = 256) -> Strip:
    """Original, reconstruction, and their difference.

    Args:
        label: the text above.
        image: [3, H, W] in -1 … 1.
        other: the same size.
        side: of the cells, in pixels.
    """
    original, again = _pixels(image), _pixels(other)
    distance = np.abs(original.astype(np.int16) - again) * AMPLIFIED
    cells = (original, again, distance.clip(0, 255).astype(np.uint8))
    return Strip(label, tuple(fitted(Image.fromarray(cell), side) for cell in cells))


def versus(label: str, image: Tensor, others: Sequence[Tensor], side: int = 192) -> Strip:
    """Original, what two autoencoders make of it, and both differences; arguments as for :func:`comparison`."""
    pairs = [comparison(label, image, other, side).cells for other in others]
    cells = (pairs[0][0], *(pair[1] for pair in pairs), *(pair[2] for pair in pairs))
    return Strip(label, cells)


def decoded(
    label: str, image: Tensor, latent: Tensor, preview: Callable[[Tensor], Any], side: int = 256
) -> Strip:
    """A decoded latent beside its preview.

    Args:
        label: the text above.
        image: [3, H, W] in -1 … 1.
        latent: [z, h, w], times the scale factor.
        preview: latents [1, z, h, w] to RGB [h, w, 3].
        side: of the cells, in pixels.
    """
    linear = Image.fromarray(preview(latent[None]))
    return Strip(label, (fitted(Image.fromarray(_pixels(image)), side), fitted(linear, side)))


def channel_maps(label: str, latent: Tensor, side: int = 160) -> Strip:
    """Every channel of a latent as a map: blue below 0, white at 0, red above.

    Args:
        label: the text above.
        latent: [z, h, w], times the scale factor.
        side: of the cells, in pixels.
    """
    return Strip(label, tuple(fitted(Image.fromarray(_diverging(channel)), side) for channel in latent))


def sheet(titles: Sequence[str], strips: Sequence[Strip]) -> Image.Image:
    """Strips below each other, with titles over the columns."""
    widths = [max(strip.cells[i].width for strip in strips) for i in range(len(strips[0].cells))]
    heights = [max(cell.height for cell in strip.cells) for strip in strips]
    width = 2 * _MARGIN + sum(widths) + _GAP * (len(widths) - 1)
    height = 2 * _MARGIN + _TEXT + sum(heights) + (_TEXT + _GAP) * len(strips)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    lefts = [_MARGIN + sum(widths[:i]) + _GAP * i for i in range(len(widths))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, _MARGIN), title, fill=_INK, font=font)
    top = _MARGIN + _TEXT
    for strip, tall in zip(strips, heights, strict=True):
        # the built-in font may have Latin letters only
        text = strip.label.encode("ascii", "replace").decode()
        draw.text((_MARGIN, top + _GAP // 2), text, fill=_INK, font=font)
        for left, cell in zip(lefts, strip.cells, strict=True):
            canvas.paste(cell, (left, top + _TEXT))
        top += _TEXT + tall + _GAP
    return canvas


def save_png(path: Path, image: Image.Image) -> None:
    """Write a sheet.

    Raises:
        FileError: the file exists already, or cannot be written.
    """
    with atomic_write(path, overwrite=False) as temporary:
        image.save(temporary, "PNG")


def _pixels(image: Tensor) -> Pixels:
    levels = ((torch.nan_to_num(image, nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels: Pixels = rearrange(levels, "c h w -> h w c").cpu().numpy()
    return pixels


def _diverging(channel: Tensor) -> Pixels:
    """[h, w] -> RGB [h, w, 3]."""
    values = channel.float().cpu().numpy() / MAP_RANGE
    finite = np.isfinite(values)
    strength = np.clip(np.where(finite, values, 0.0), -1, 1)
    red, blue = 1 - np.maximum(-strength, 0), 1 - np.maximum(strength, 0)
    colours = np.stack([red, 1 - np.abs(strength), blue], axis=-1)
    pixels: Pixels = (colours * 255).round().astype(np.uint8)
    pixels[~finite] = NOT_FINITE
    return pixels


def fitted(image: Image.Image, side: int) -> Image.Image:
    """A picture shrunk to ``side``, or enlarged as often as it fits in whole numbers: its pixels can be seen."""
    longest = max(image.size)
    if longest > side:
        width, height = (max(1, round(length * side / longest)) for length in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    times = side // longest
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
