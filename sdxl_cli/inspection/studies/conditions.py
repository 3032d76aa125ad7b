"""What the micro-conditions do: the size a model is told (paper, Figure 3), and the crop (Figure 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from sdxl_cli.console import Cell
from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.sizes import format_size, parse_corner, parse_size
from sdxl_cli.inspection.studies.base import (
    About,
    Design,
    Frame,
    Outcome,
    Place,
    StudyRequest,
    mean_and_error,
    rows_of,
    with_error,
)
from sdxl_cli.inspection.studies.measures import rank_correlation, sharpness, subject

_FLAG = "--values"


class SizeStudy:
    """Same noise, same prompt, other original sizes: small ones should give blurred pictures, large ones sharp."""

    name = "size"
    title = "Size conditioning (Figure 3)"
    about = "the same picture told to come from small and from large originals"
    values_are = "original sizes, WxH"
    needs_refiner = False

    def design(self, asked: StudyRequest, base: GenerateRequest, about: About) -> Design:
        """Columns are original sizes, by default an eighth of the native side to twice as much."""
        defaults = (f"{about.native * part // 8}x{about.native * part // 8}" for part in (1, 2, 4, 8, 16))
        sizes = [format_size(parse_size(text, _FLAG)) for text in asked.values or defaults]
        rows = rows_of(asked, base)
        frames = tuple(
            Frame(place=(column, row), request=replace(base, prompt=prompt, seed=seed, original_size=size))
            for row, (_, prompt, seed) in enumerate(rows)
            for column, size in enumerate(sizes)
        )
        labels = tuple(f"original size {size}" for size in sizes)
        return Design(columns=labels, rows=tuple(label for label, _, _ in rows), frames=frames)

    def extra(self, pictures: Mapping[Place, Pixels], design: Design) -> tuple[Design, dict[Place, Pixels]]:
        """As they are."""
        return design, dict(pictures)

    def measure(self, pictures: Mapping[Place, Pixels], design: Design) -> Outcome:
        """Fine detail by original size, and whether it grows with it."""
        told = _column_values(design, lambda request: request.original_size or "")
        areas = [math.sqrt(math.prod(parse_size(size, _FLAG))) for size in told]
        values = {at: sharpness(pixels) for at, pixels in pictures.items()}
        columns = _by_column(values, len(told))
        means = [mean_and_error(column)[0] for column in columns]
        trends = [rank_correlation(areas, row) for row in _by_row(values, design)] if len(told) > 1 else []
        known = [trend for trend in trends if math.isfinite(trend)]
        trend = fmean(known) if known else math.nan
        low, high = means[areas.index(min(areas))], means[areas.index(max(areas))]
        gain = high / low if low else math.nan
        table = tuple(
            (
                size,
                with_error([100 * v for v in column], 2),
                mean / means[0] if means[0] else None,
                len(column),
            )
            for size, column, mean in zip(told, columns, means, strict=True)
        )
        return Outcome(
            head=("original size", "fine detail, % of power", "times the first", "pictures"),
            table=table,
            numbers={"gain": gain, "rank_correlation": trend},
            says=f"told the largest size instead of the smallest, pictures have {gain:.2f} times the share of fine "
            f"detail; rank correlation of size and detail {trend:+.2f} on average over {len(trends)} rows",
            curves={"fine detail, %": [(a, 100 * m) for a, m in sorted(zip(areas, means, strict=True))]},
            across="square root of the original area, pixels",
        )


class CropStudy:
    """Same noise, same prompt, other crops: the subject should move out of the picture where more was cut off."""

    name = "crop"
    title = "Crop conditioning (Figure 4)"
    about = "the same picture told to be cut out further down and further right"
    values_are = "TOP,LEFT in pixels"
    needs_refiner = False

    def design(self, asked: StudyRequest, base: GenerateRequest, about: About) -> Design:
        """Columns are crops, by default none, and half of the native side from the left, the top, and both."""
        half = about.native // 2
        defaults = (f"{top},{left}" for top, left in ((0, 0), (0, half), (half, 0), (half, half)))
        crops = ["{},{}".format(*parse_corner(text, _FLAG)) for text in asked.values or defaults]
        rows = rows_of(asked, base)
        frames = tuple(
            Frame(place=(column, row), request=replace(base, prompt=prompt, seed=seed, crop_top_left=crop))
            for row, (_, prompt, seed) in enumerate(rows)
            for column, crop in enumerate(crops)
        )
        labels = tuple("crop top {}, left {}".format(*crop.split(",")) for crop in crops)
        return Design(columns=labels, rows=tuple(label for label, _, _ in rows), frames=frames)

    def extra(self, pictures: Mapping[Place, Pixels], design: Design) -> tuple[Design, dict[Place, Pixels]]:
        """As they are."""
        return design, dict(pictures)

    def measure(self, pictures: Mapping[Place, Pixels], design: Design) -> Outcome:
        """Where the subject's centre is beside the first column's, and how much of the border it covers."""
        told = _column_values(design, lambda request: request.crop_top_left)
        found = {at: subject(pixels) for at, pixels in pictures.items()}
        rows = sorted({row for _, row in found})
        table: list[tuple[Cell, ...]] = []
        shifts: list[tuple[float, float]] = []
        cuts: list[float] = []
        for column, crop in enumerate(told):
            down = [100 * (found[column, row].top - found[0, row].top) for row in rows]
            right = [100 * (found[column, row].left - found[0, row].left) for row in rows]
            cut = [100 * found[column, row].cut for row in rows]
            cover = [100 * found[column, row].coverage for row in rows]
            shifts.append((mean_and_error(down)[0], mean_and_error(right)[0]))
            cuts.append(fmean(cut))
            table.append((crop, *(with_error(values, 1) for values in (down, right, cut, cover))))
        follows = _along([_corner(crop) for crop in told], shifts)
        cropped = [cut for crop, cut in zip(told, cuts, strict=True) if _corner(crop) != _corner(told[0])]
        change = fmean(cropped) - cuts[0] if cropped else math.nan
        return Outcome(
            head=(
                "crop top,left",
                "centre moves down, %",
                "right, %",
                "border covered, %",
                "subject, % of area",
            ),
            table=tuple(table),
            numbers={"shift_against_crop": follows, "border_change": change},
            says=f"where more is cut off above or left, the subject moves up or left by {follows:.1f} % of the side on "
            f"average, and covers {change:+.1f} points more of the border than with crop {told[0]}",
        )


def _along(crops: Sequence[tuple[int, int]], shifts: Sequence[tuple[float, float]]) -> float:
    """The mean shift towards the side that was cut off, over all crops and directions with a cut, in %."""
    first = crops[0]
    towards = [
        -shift * (1 if crop > origin else -1)
        for corner, moved in zip(crops, shifts, strict=True)
        for crop, origin, shift in zip(corner, first, moved, strict=True)
        if crop != origin and math.isfinite(shift)
    ]
    return fmean(towards) if towards else math.nan


def _corner(text: str) -> tuple[int, int]:
    return parse_corner(text, _FLAG)


def _column_values(design: Design, value: Callable[[GenerateRequest], str]) -> list[str]:
    """What was told in each column."""
    first = {frame.place[0]: frame.request for frame in design.frames if frame.place[1] == 0}
    return [value(first[column]) for column in range(len(first))]


def _by_column(values: Mapping[Place, float], columns: int) -> list[list[float]]:
    return [[value for (at, _), value in sorted(values.items()) if at == column] for column in range(columns)]


def _by_row(values: Mapping[Place, float], design: Design) -> list[list[float]]:
    return [
        [value for (_, at), value in sorted(values.items()) if at == row] for row in range(len(design.rows))
    ]
