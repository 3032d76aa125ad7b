"""Sizes as people type them. On the command line they are ``WxH``; inside they are (height, width)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from sdxl_cli.errors import UsageError

Size = tuple[int, int]
"""(height, width) in pixels."""

_NUMBER = r"(\d+(?:\.\d+)?)"
_EXACT = re.compile(r"(\d+)\s*[x×*]\s*(\d+)", re.IGNORECASE)
_RATIO = re.compile(rf"{_NUMBER}\s*[:/]\s*{_NUMBER}")
_PAIR = re.compile(r"(-?\d+)\s*,\s*(-?\d+)")
LARGEST_SIDE = 16384
"""Pixels; what is larger is a slip of the keyboard."""


def parse_size(text: str, name: str) -> Size:
    """``"832x1216"`` (width first) to (1216, 832).

    Args:
        text: what the user typed.
        name: the flag, for the error.

    Raises:
        UsageError: not a size of at least one pixel.
    """
    match = _EXACT.fullmatch(text.strip())
    width, height = (int(group) for group in match.groups()) if match else (0, 0)
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise UsageError(f"{name} {text}: expected WIDTHxHEIGHT in pixels, such as 1216x832")
    return height, width


def parse_corner(text: str, name: str) -> tuple[int, int]:
    """``"TOP,LEFT"`` in pixels to (top, left).

    Raises:
        UsageError: not two whole numbers.
    """
    match = _PAIR.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{name} {text}: expected TOP,LEFT in pixels, such as 0,0")
    return int(match[1]), int(match[2])


def output_size(text: str, name: str, *, buckets: Sequence[Size], multiple: int) -> Size:
    """The size of the picture to make, from ``"WxH"`` or a ratio such as ``"16:9"``.

    A ratio picks the bucket of the model's own area with the nearest ratio, so that the model is asked for what
    it was trained on (paper section 2.3 and Appendix I).

    Args:
        text: what the user typed.
        name: the flag, for the error.
        buckets: (height, width) of the sizes the model was trained on.
        multiple: both sides must be multiples of this.

    Raises:
        UsageError: neither a size nor a ratio, or a side that the model cannot make; the error has the nearest
            size that it can.
    """
    if ratio := _RATIO.fullmatch(text.strip()):
        wide, high = float(ratio[1]), float(ratio[2])
        if wide <= 0 or high <= 0:
            raise UsageError(f"{name} {text}: both parts of a ratio must be above 0")
        usable = [size for size in buckets if not (size[0] % multiple or size[1] % multiple)]
        return nearest_bucket(wide / high, usable)
    if not _EXACT.fullmatch(text.strip()):
        raise UsageError(
            f"{name} {text}: expected WIDTHxHEIGHT in pixels such as 1216x832, or a ratio such as 16:9"
        )
    size = parse_size(text, name)
    require_multiple(size, name, multiple)
    return size


def require_multiple(size: Size, name: str, multiple: int) -> None:
    """Refuse a (height, width) whose sides are not multiples of ``multiple``, naming the nearest that is."""
    if any(side % multiple for side in size):
        raise UsageError(
            f"{name} {format_size(size)}: both sides must be multiples of {multiple} for this model; "
            f"the nearest is {format_size(nearest_multiple(size, multiple))}"
        )


def nearest_multiple(size: Size, multiple: int) -> Size:
    """The (height, width) nearest to ``size`` with both sides multiples of ``multiple``."""
    height, width = (max(multiple, multiple * math.floor(side / multiple + 0.5)) for side in size)
    return height, width


def nearest_bucket(aspect: float, buckets: Sequence[Size]) -> Size:
    """The bucket whose width / height is nearest to ``aspect``, on a logarithmic scale: 2:1 is as far as 1:2."""
    return min(buckets, key=lambda size: (abs(math.log(size[1] / size[0] / aspect)), -size[0] * size[1]))


def format_size(size: Size) -> str:
    """(height, width) as people type it: ``WxH``."""
    return f"{size[1]}x{size[0]}"
