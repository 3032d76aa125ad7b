"""The picture a run begins with: read, resized, extended, masked, cut to what a model takes; and the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.mask import Mask, Share, blend, bounds, feather, read_mask
from sdxl_cli.generation.picture import Pixels, read_pixels
from sdxl_cli.generation.request import GenerateRequest, ResizeMode
from sdxl_cli.generation.sizes import Size, format_size

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels; the last two are outside."""

_REACH = 2
"""How far the colours at an edge are matched, in latents."""
_LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Canvas:
    """What a run starts from, and what becomes of its pixels."""

    pixels: Pixels
    """[H, W, 3] uint8 as the model sees it; sides are multiples of what it needs."""
    repaint: Mask | None
    """[H, W]: what is repainted of ``pixels``; None is all of it."""
    picture: Pixels
    """[h, w, 3] uint8 of the size of the result, with the old pixels wherever there are any."""
    share: Share | None
    """[h, w]: how much of each pixel of the result is new; None is all of it."""
    window: Box
    """The part of ``picture`` that ``pixels`` shows."""
    shown: Size
    """(height, width) of ``window`` in ``pixels``; what is beyond only fills up the last latents."""
    reach: float
    """How far inwards colours are matched along the edge of what is repainted, in pixels."""

    @property
    def size(self) -> Size:
        """(height, width) the model works at."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def result_size(self) -> Size:
        """(height, width) of the finished picture."""
        return self.picture.shape[0], self.picture.shape[1]

    def finish(self, made: Pixels) -> Pixels:
        """The model's picture [k·H, k·W, 3] to the finished one; pixels that are not repainted are untouched.

        ``made`` may be k times as large as ``pixels`` when all of it is new; the result then is, too.
        """
        top, left, bottom, right = self.window
        if self.share is None:
            factor = made.shape[0] / self.pixels.shape[0]
            height, width = (round(side * factor) for side in self.shown)
            return np.ascontiguousarray(made[:height, :width])
        inside = resized(made[: self.shown[0], : self.shown[1]], (bottom - top, right - left))
        result = self.picture.copy()
        result[top:bottom, left:right] = blend(
            inside,
            self.picture[top:bottom, left:right],
            self.share[top:bottom, left:right],
            reach=self.reach,
        )
        return result

    def describe(self) -> str:
        """One line: what is worked on."""
        if self.repaint is None:
            return f"starts from a picture of {format_size(self.result_size)}"
        share = float((self.share > 0).mean()) if self.share is not None else 1.0
        top, left, bottom, right = self.window
        text = f"repaints {100 * share:.1f} % of {format_size(self.result_size)}"
        if (bottom - top, right - left) != self.result_size:
            part = format_size((bottom - top, right - left))
            text += f", working on {part} at {left},{top} as {format_size(self.shown)}"
        return text


def open_canvas(request: GenerateRequest, *, multiple: int, native: Size, size: Size | None) -> Canvas | None:
    """Read what a request starts from; None when it starts from noise alone.

    Args:
        request: names the files and says how they are fitted.
        multiple: what the sides must be multiples of. A picture is filled up to them and cut back in the end.
        native: (height, width) of the square the model was trained on.
        size: (height, width) asked for, if any: of the result, or with ``only_masked`` of what is worked on.

    Raises:
        FileError: a file is missing or no picture.
        UsageError: the parts of the request do not go together.
    """
    if request.init_img is None:
        return None
    background = parse_colour(request.background)
    picture = read_pixels(Path(request.init_img).expanduser(), background=background)
    mask = None
    if request.mask is not None:
        source = (picture.shape[0], picture.shape[1])
        mask = read_mask(Path(request.mask).expanduser(), source, invert=request.invert_mask)
    if size is not None and not request.only_masked:
        mode = request.resize_mode or "crop"
        picture = fitted(picture, size, mode, background)
        mask = None if mask is None else fitted_mask(mask, size, mode)
    share = None if mask is None else feather(mask, request.mask_blur)
    if request.outpaint is not None:
        margins = parse_margins(request.outpaint)
        picture, share = extended(picture, share, margins)
    whole = (0, 0, picture.shape[0], picture.shape[1])
    window, working = whole, (whole[2], whole[3])
    if request.only_masked:
        assert share is not None
        window = around(bounds(share > 0), request.mask_padding, whole, size)
        working = enlarged(window, size or native)
    top, left, bottom, right = window
    shown = resized(picture[top:bottom, left:right], working)
    repaint = None if share is None else resized_mask(share[top:bottom, left:right] > 0, working)
    return Canvas(
        pixels=filled_up(shown, multiple),
        repaint=None if repaint is None else filled_up(repaint, multiple),
        picture=picture,
        share=share,
        window=window,
        shown=working,
        reach=_REACH * multiple * (bottom - top) / working[0],
    )


def parse_colour(text: str) -> tuple[int, int, int]:
    """A colour's name or ``#rrggbb`` to (red, green, blue).

    Raises:
        UsageError: it is not one.
    """
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UsageError(f"--background {text}: expected a colour such as white, gray or #4080ff") from error


def parse_margins(text: str) -> Box:
    """``"LEFT,TOP,RIGHT,BOTTOM"`` in pixels to (top, left, bottom, right).

    Raises:
        UsageError: not four numbers of 0 or more, or all of them 0.
    """
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        left = top = right = bottom = -1
    if min(left, top, right, bottom) < 0 or max(left, top, right, bottom) == 0:
        raise UsageError(
            f"--outpaint {text}: expected the pixels to add as LEFT,TOP,RIGHT,BOTTOM, such as 128,0,128,0"
        )
    return top, left, bottom, right


def fitted(pixels: Pixels, size: Size, mode: ResizeMode, background: tuple[int, int, int]) -> Pixels:
    """A picture at another (height, width).

    ``crop`` fills the size and cuts off what stands over, evenly; ``pad`` shows all of it on ``background``;
    ``stretch`` ignores its shape; ``fit`` makes it as large as fits in, and the result may be smaller.
    """
    image, (height, width) = Image.fromarray(pixels), size
    match mode:
        case "crop":
            image = ImageOps.fit(image, (width, height), _LANCZOS)
        case "pad":
            image = ImageOps.pad(image, (width, height), _LANCZOS, color=background)
        case "stretch":
            image = image.resize((width, height), _LANCZOS)
        case "fit":
            image = ImageOps.contain(image, (width, height), _LANCZOS)
    return np.asarray(image)


def fitted_mask(mask: Mask, size: Size, mode: ResizeMode) -> Mask:
    """A mask where :func:`fitted` puts its picture; a background is not repainted."""
    levels = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)
    moved: Mask = fitted(levels, size, mode, (0, 0, 0))[..., 0] >= 128
    return moved


def extended(pixels: Pixels, share: Share | None, margins: Box) -> tuple[Pixels, Share]:
    """A larger picture: the new area begins with the colours of the nearest pixels, and is all repainted."""
    top, left, bottom, right = margins
    sides = ((top, bottom), (left, right))
    inner = np.zeros(pixels.shape[:2], np.float32) if share is None else share
    return (
        np.pad(pixels, (*sides, (0, 0)), mode="edge"),
        np.pad(inner, sides, constant_values=1.0),
    )


def around(part: Box, padding: int, whole: Box, size: Size | None) -> Box:
    """``part`` with ``padding`` pixels on each side, and of the shape of ``size`` as far as ``whole`` allows."""
    top, left = max(part[0] - padding, 0), max(part[1] - padding, 0)
    bottom, right = min(part[2] + padding, whole[2]), min(part[3] + padding, whole[3])
    if size is None:
        return top, left, bottom, right
    height, width = bottom - top, right - left
    tall = min(max(height, round(width * size[0] / size[1])), whole[2])
    wide = min(max(width, round(height * size[1] / size[0])), whole[3])
    top = min(max(top - (tall - height) // 2, 0), whole[2] - tall)
    left = min(max(left - (wide - width) // 2, 0), whole[3] - wide)
    return top, left, top + tall, left + wide


def enlarged(window: Box, size: Size) -> Size:
    """The (height, width) at which a window is worked on: its own shape, with the area of ``size``."""
    height, width = window[2] - window[0], window[3] - window[1]
    factor = math.sqrt(size[0] * size[1] / (height * width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resized(pixels: Pixels, size: Size) -> Pixels:
    """[h, w, 3] at another (height, width); untouched when it has it already."""
    if (pixels.shape[0], pixels.shape[1]) == size:
        return pixels
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size[::-1], _LANCZOS))


def resized_mask(mask: Mask, size: Size) -> Mask:
    """[h, w] at another (height, width): a pixel that is repainted in part is repainted."""
    if mask.shape == size:
        return mask
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], Image.Resampling.BILINEAR)
    moved: Mask = np.asarray(image) > 0
    return moved


def filled_up(values: NDArray[Any], multiple: int) -> NDArray[Any]:
    """Repeat the last rows and columns until the sides are multiples of ``multiple``."""
    missing = [-side % multiple for side in values.shape[:2]]
    if not any(missing):
        return np.ascontiguousarray(values)
    sides = [(0, missing[0]), (0, missing[1]), (0, 0)][: values.ndim]
    return np.pad(values, sides, mode="edge")
