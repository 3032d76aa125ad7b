"""Grids: the pictures of a sweep side by side, with what differs written above and beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdxl_cli.generation.jobs import Settled
from sdxl_cli.generation.metadata import FORMAT
from sdxl_cli.generation.picture import Pixels, Texts, read_pixels
from sdxl_cli.generation.sweep import Axis

LONGEST_SIDE = 16000
"""Pixels; WebP stops at 16383. Larger grids are drawn with smaller pictures."""

_INK, _PAPER = (24, 24, 24), (255, 255, 255)
_SMALLEST_TEXT, _LARGEST_TEXT = 12, 40
_LINES = 6
"""Of a label; what is longer ends in three dots."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """What varies in one direction."""

    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One grid to draw."""

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Mapping[tuple[int, int], Path]
    """(column, row) -> picture file."""


def sheets(dimensions: Sequence[Dimension], made: Mapping[tuple[int, ...], Path]) -> Iterator[Sheet]:
    """The grids that show all pictures: the first dimension across, the second down, a grid for each of the rest.

    Args:
        dimensions: what varies; those of one value are left out of the labels.
        made: place on every dimension -> picture file.
    """
    varying = [index for index, one in enumerate(dimensions) if len(one.labels) > 1]
    across, down, *rest = [*varying, None, None][: max(2, len(varying))]
    for places in product(*(range(len(dimensions[index].labels)) for index in rest if index is not None)):
        fixed = dict(zip(rest, places, strict=True))
        cells = {
            (0 if across is None else at[across], 0 if down is None else at[down]): path
            for at, path in made.items()
            if all(at[index] == place for index, place in fixed.items() if index is not None)
        }
        title = ", ".join(
            dimensions[index].labels[place] for index, place in fixed.items() if index is not None
        )
        columns = dimensions[across].labels if across is not None else ("",)
        rows = dimensions[down].labels if down is not None else ("",)
        if cells:
            yield Sheet(title, columns, rows, cells)


def grid_sheets(
    made: Sequence[tuple[Settled, Sequence[Path]]], axes: Sequence[Axis]
) -> Iterator[tuple[Sheet, Sequence[str]]]:
    """The grids of finished jobs, each with the captions of its pictures, when they have some.

    The sweeps come first, then the seeds of one job, then the prompts of a file. Pictures that differ in their seed
    or in their prompt alone stand in a near square.

    Args:
        made: jobs with their picture files.
        axes: the sweeps.
    """
    seeds, prompts = _seeds(made), _prompts(made)
    lines = {line: index for index, line in enumerate(sorted({one.job.line for one, _ in made}))}
    dimensions = [Dimension(tuple(map(axis.label, axis.values))) for axis in axes]
    dimensions += [Dimension(seeds), Dimension(prompts)]
    places = {
        (*one.job.cell, index, lines[one.job.line]): path
        for one, paths in made
        for index, path in enumerate(paths)
    }
    if axes or (len(seeds) > 1 and len(prompts) > 1):
        yield from ((sheet, ()) for sheet in sheets(dimensions, places))
        return
    ordered = sorted(places)
    wide = math.ceil(math.sqrt(len(ordered)))
    cells = {(index % wide, index // wide): places[at] for index, at in enumerate(ordered)}
    captions = [seeds[at[0]] if len(seeds) > 1 else prompts[at[1]] for at in ordered]
    yield Sheet("", [""] * wide, [""] * math.ceil(len(ordered) / wide), cells), captions


def _seeds(made: Sequence[tuple[Settled, Sequence[Path]]]) -> tuple[str, ...]:
    """What the pictures of one job are called: by seed, where all jobs have the same."""
    count = max(len(paths) for _, paths in made)
    first = {one.plan.request.seed for one, _ in made}
    if len(first) == 1:
        return tuple(f"seed {seed}" for seed in range(min(first), min(first) + count))
    return tuple(f"picture {index + 1}" for index in range(count))


def _prompts(made: Sequence[tuple[Settled, Sequence[Path]]]) -> tuple[str, ...]:
    """What the lines of a prompt file are called: by prompt, unless two have the same."""
    jobs = {one.job.line: one.job for one, _ in reversed(made)}
    prompts = tuple(jobs[line].request.prompt for line in sorted(jobs))
    return prompts if len(set(prompts)) == len(prompts) else tuple(jobs[line].where for line in sorted(jobs))


def draw(sheet: Sheet, captions: Sequence[str] = ()) -> Pixels:
    """The grid as RGB [H, W, 3].

    Args:
        sheet: what to draw. Pictures keep their size and are centred where sizes differ.
        captions: written above each picture, row by row, instead of above the columns.

    Raises:
        FileError: a picture cannot be read.
    """
    pictures = {at: Image.fromarray(read_pixels(path)) for at, path in sheet.cells.items()}
    pictures = _shrunk(pictures, len(sheet.columns), len(sheet.rows))
    widths = [_largest(pictures, 0, column, 0) for column in range(len(sheet.columns))]
    heights = [_largest(pictures, 1, row, 1) for row in range(len(sheet.rows))]
    size = min(_LARGEST_TEXT, max(_SMALLEST_TEXT, max(widths) // 16))
    font = ImageFont.load_default(size)
    gap, line = max(4, size // 2), math.ceil(size * 1.3)
    wide = list(sheet.columns) if not captions else [""] * len(widths)
    heads = [_wrapped(text, font, width) for text, width in zip(wide, widths, strict=True)]
    room = min(max(widths), max(size * 12, 120))
    sides = [_wrapped(text, font, room) for text in sheet.rows]
    room = math.ceil(max((font.getlength(text) for lines in sides for text in lines), default=0))
    above = [_wrapped(text, font, max(widths)) for text in captions]
    caption = max((len(lines) for lines in above), default=0) * line
    heights = [max(height + caption, len(side) * line) for height, side in zip(heights, sides, strict=True)]
    title = _wrapped(sheet.title, font, sum(widths) + gap * len(widths))
    left = gap + (room + gap if any(sides) else 0)
    top = gap + len(title) * line + max(map(len, heads)) * line + (gap if any(heads) or title else 0)
    lefts = [left + sum(widths[:i]) + gap * i for i in range(len(widths))]
    tops = [top + sum(heights[:i]) + gap * i for i in range(len(heights))]
    canvas = Image.new("RGB", (lefts[-1] + widths[-1] + gap, tops[-1] + heights[-1] + gap), _PAPER)
    pen = _Pen(ImageDraw.Draw(canvas), font, line)
    pen.write(title, gap, gap)
    for head, x, width in zip(heads, lefts, widths, strict=True):
        pen.write(head, x, top - gap - len(head) * line, centred_in=width)
    for side, y, height in zip(sides, tops, heights, strict=True):
        pen.write(side, gap, y + max(0, (height - len(side) * line) // 2))
    for index, lines in enumerate(above):
        column, row = index % len(widths), index // len(widths)
        pen.write(lines, lefts[column], tops[row])
    for (column, row), picture in pictures.items():
        x = lefts[column] + (widths[column] - picture.width) // 2
        y = tops[row] + caption + (heights[row] - caption - picture.height) // 2
        canvas.paste(picture, (x, y))
    return np.asarray(canvas)


def grid_texts(sheet: Sheet) -> Texts:
    """What a grid says about itself: which pictures it shows, so that nobody takes it for one."""
    cells = [
        {
            "column": sheet.columns[column],
            "row": sheet.rows[row],
            "path": str(path),
        }
        for (column, row), path in sorted(sheet.cells.items(), key=lambda item: item[0][::-1])
    ]
    record = {"format": FORMAT, "kind": "grid", "title": sheet.title, "cells": cells}
    return Texts(record=json.dumps(record, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class _Pen:
    """Writes lines of text."""

    surface: ImageDraw.ImageDraw
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    line: int

    def write(self, lines: Sequence[str], x: int, y: int, *, centred_in: int = 0) -> None:
        """``lines`` from (x, y) down, each in the middle of ``centred_in`` pixels when given."""
        for index, text in enumerate(lines):
            shift = max(0, (centred_in - self.font.getlength(text)) / 2) if centred_in else 0
            self.surface.text((x + shift, y + index * self.line), text, fill=_INK, font=self.font)


def _shrunk(
    pictures: dict[tuple[int, int], Image.Image], columns: int, rows: int
) -> dict[tuple[int, int], Image.Image]:
    """All pictures smaller by one factor, where the whole would be too large for picture files."""
    widest = max(picture.width for picture in pictures.values())
    tallest = max(picture.height for picture in pictures.values())
    # a fifth for labels and gaps
    factor = min(1.0, 0.8 * LONGEST_SIDE / (widest * columns), 0.8 * LONGEST_SIDE / (tallest * rows))
    if factor == 1.0:
        return pictures
    return {
        at: picture.resize(
            (max(1, int(picture.width * factor)), max(1, int(picture.height * factor))),
            Image.Resampling.LANCZOS,
        )
        for at, picture in pictures.items()
    }


def _largest(pictures: Mapping[tuple[int, int], Image.Image], axis: int, index: int, side: int) -> int:
    """The longest side (0: width, 1: height) among the pictures of a column (axis 0) or row (axis 1)."""
    sizes = [picture.size[side] for at, picture in pictures.items() if at[axis] == index]
    return max(sizes, default=max(picture.size[side] for picture in pictures.values()))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels; letters that the built-in font lacks become question marks."""
    words = text.encode("latin-1", "replace").decode("latin-1").split()
    lines: list[str] = []
    for word in words:
        for piece in _pieces(word, font, width):
            longer = f"{lines[-1]} {piece}" if lines else piece
            if lines and font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1]} ..."]
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Iterator[str]:
    """A word in pieces that fit, when it is longer than a line."""
    while word and font.getlength(word) > width:
        fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
        yield word[:fits]
        word = word[fits:]
    if word:
        yield word
