"""Rectangles, lines and words, drawn as SVG or as pixels."""

from __future__ import annotations

from functools import lru_cache
from html import escape
from typing import Any, Literal, Protocol

from PIL import Image, ImageDraw, ImageFont

Anchor = Literal["start", "middle", "end"]
FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Canvas(Protocol):
    """Something to draw on; units are pixels, y grows downwards, colours are ``#rrggbb``."""

    def rect(self, x: float, y: float, width: float, height: float, fill: str, hint: str = "") -> None:
        """A filled rectangle; ``hint`` is shown when a mouse rests on it, where there are mice."""
        ...

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False) -> None:
        """A line one pixel wide."""
        ...

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 12,
        anchor: Anchor = "start",
        colour: str = "#1c2733",
    ) -> None:
        """One line of words; ``y`` is their middle."""
        ...


class SvgCanvas:
    """Draws SVG."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str, hint: str = "") -> None:
        """See :meth:`Canvas.rect`."""
        inner = f"><title>{escape(hint)}</title></rect>" if hint else "/>"
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{inner}'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False) -> None:
        """See :meth:`Canvas.line`."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}"{dash}/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 12,
        anchor: Anchor = "start",
        colour: str = "#1c2733",
    ) -> None:
        """See :meth:`Canvas.text`."""
        # a third of the size below the middle: browsers disagree about dominant-baseline
        where = (
            f'x="{x:.1f}" y="{y + size * 0.35:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
        )
        self._parts.append(f"<text {where}>{escape(text)}</text>")

    def svg(self) -> str:
        """The document, on white."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="{FONT}">'
        )
        ground = f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>'
        return "\n".join([head, ground, *self._parts, "</svg>"])


class PixelCanvas:
    """Draws pixels, each unit as ``scale`` of them."""

    def __init__(self, width: int, height: int, scale: int = 2) -> None:
        self._scale = scale
        self.image = Image.new("RGB", (width * scale, height * scale), "#ffffff")
        self._draw = ImageDraw.Draw(self.image)

    def rect(self, x: float, y: float, width: float, height: float, fill: str, hint: str = "") -> None:
        """See :meth:`Canvas.rect`; there is no mouse."""
        s = self._scale
        corner = (round((x + width) * s) - 1, round((y + height) * s) - 1)
        if corner[0] >= round(x * s) and corner[1] >= round(y * s):
            self._draw.rectangle((round(x * s), round(y * s), *corner), fill=fill)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False) -> None:
        """See :meth:`Canvas.line`."""
        s = self._scale
        length = max(abs(x2 - x1), abs(y2 - y1)) or 1
        pieces = [(i, min(i + 5, length)) for i in range(0, int(length) + 1, 9)] if dashed else [(0, length)]
        for start, end in pieces:
            ends = [(x1 + (x2 - x1) * t / length, y1 + (y2 - y1) * t / length) for t in (start, end)]
            self._draw.line([(round(x * s), round(y * s)) for x, y in ends], fill=colour, width=s)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 12,
        anchor: Anchor = "start",
        colour: str = "#1c2733",
    ) -> None:
        """See :meth:`Canvas.text`."""
        s = self._scale
        at = {"start": "lm", "middle": "mm", "end": "rm"}[anchor]
        self._draw.text((x * s, y * s), text, fill=colour, font=_font(size * s), anchor=at)


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
