"""FID (or KID) against CLIP score over guidance scales, drawn as the paper's Figure 12 is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.data.canvas import PixelCanvas
from sdxl_cli.evaluation.scores import Row

WIDTH, HEIGHT = 640, 440
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 44, 24, 56
_INK, _FAINT, _RULE, _MARK = "#1c2733", "#5b6b7b", "#e3e8ee", "#2f6db3"
_TICKS = 5


@dataclass(frozen=True, slots=True)
class Point:
    """One guidance scale."""

    label: str
    x: float
    y: float


def points(rows: Sequence[Row]) -> tuple[str, list[Point]] | None:
    """What there is to draw: the metric of the y axis, and a point a row. None with fewer than two points.

    Rows without CLIP score or without FID and KID have no place.
    """
    for metric in ("FID", "KID"):
        found = []
        for row in rows:
            values = {score.metric: score.value for score in row.scores}
            if metric in values and "CLIP score" in values:
                found.append(Point(row.name, values["CLIP score"], values[metric]))
        if len(found) > 1:
            return metric, found
    return None


def draw(path: Path, metric: str, found: Sequence[Point]) -> None:
    """A picture of the points, joined in their order, replacing the one of an earlier run of the same folder.

    Args:
        path: a .png.
        metric: of the y axis; lower is better.
        found: at least two.
    """
    canvas = PixelCanvas(WIDTH, HEIGHT)
    across, down = _ticks([point.x for point in found]), _ticks([point.y for point in found])

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - across[0]) / (across[-1] - across[0]), (y - down[0]) / (down[-1] - down[0])
        return _LEFT + share[0] * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - share[1] * (
            HEIGHT - _TOP - _BOTTOM
        )

    canvas.text(
        _LEFT, 20, f"{metric} against CLIP score; better is to the right and down", size=14, colour=_INK
    )
    for tick in across:
        x, _ = place(tick, down[0])
        canvas.line(x, _TOP, x, HEIGHT - _BOTTOM, _RULE)
        canvas.text(x, HEIGHT - _BOTTOM + 14, f"{tick:g}", anchor="middle", colour=_FAINT)
    for tick in down:
        _, y = place(across[0], tick)
        canvas.line(_LEFT, y, WIDTH - _RIGHT, y, _RULE)
        canvas.text(_LEFT - 8, y, f"{tick:g}", anchor="end", colour=_FAINT)
    canvas.text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 16, "CLIP score", anchor="middle", colour=_INK)
    places = [place(point.x, point.y) for point in found]
    for (x1, y1), (x2, y2) in zip(places, places[1:], strict=False):
        canvas.line(x1, y1, x2, y2, _MARK)
    for point, (x, y) in zip(found, places, strict=True):
        canvas.rect(x - 3, y - 3, 6, 6, _MARK)
        canvas.text(x, y - 14, point.label, anchor="middle", colour=_INK)
    with atomic_write(path) as temporary:
        canvas.image.save(temporary)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values, about ``_TICKS`` of them."""
    low, high = min(values), max(values)
    room = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(room / _TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= room / _TICKS)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]
