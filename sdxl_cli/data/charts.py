"""What a manifest looks like: sizes, buckets, enlarging, cropping, captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sdxl_cli.data.buckets import Size
from sdxl_cli.data.canvas import Canvas
from sdxl_cli.data.manifest import Manifest
from sdxl_cli.data.remainder import BucketRepeats, effective_repeats
from sdxl_cli.data.summary import MAX_TOKENS

INK, FAINT, RULE, BAR, MARK = "#1c2733", "#5b6b7b", "#e3e8ee", "#2f6db3", "#d9541e"
CELLS = 40
"""Of the heat map, along each axis."""
PAPER_SIDE = 256
"""Where the paper's Figure 2 has its dashed lines, in pixels."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture of the report."""

    title: str
    says: str
    """What to read from it, in a sentence."""
    height: int
    """In pixels."""
    draw: Callable[[Canvas, float, float, float], None]
    """(canvas, left, top, width)"""


def charts(manifest: Manifest) -> list[Chart]:
    """All charts of a manifest."""
    first = [row for row in manifest.rows if row.crop == 0]
    kept = [row for row in first if row.kept]
    sizes = [row.original_size for row in first if row.original_size]
    small = sum(min(size) < PAPER_SIDE for size in sizes)
    found = [
        Chart(
            "Height and width",
            f"{_percent(small, len(sizes))} of the readable pictures have a side below {PAPER_SIDE} pixels (left of or "
            "above the dashed lines): a minimum size would have thrown them away. The paper had 39 % (Figure 2).",
            470,
            partial(_heat_map, sizes),
        )
    ]
    if not kept:
        return found
    batch = manifest.config.batch_size
    scales = [row.plan.scale for row in kept]
    losses = [100 * row.plan.crop_loss for row in kept]
    tokens = [count for row in kept for count in row.tokens_clip_l]
    repeats = effective_repeats(manifest.rows, batch or 1, manifest.config.remainder)
    found += [
        Chart(
            "Buckets",
            "Pictures in each bucket (height x width)"
            + (f", and how full the last of its batches of {batch} is." if batch else "."),
            46 + 17 * len(repeats),
            partial(_buckets, repeats, batch),
        ),
        Chart(
            "Scale",
            f"{_percent(sum(s > 1 for s in scales), len(scales))} are enlarged to fill their bucket; "
            f"the most {max(scales):.2f} times. Right of the line: enlarged.",
            230,
            partial(_histogram, [math.log2(s) for s in scales], 24, 0.0, lambda v: f"{2**v:.3g}x"),
        ),
        Chart(
            "Cut off",
            f"Share of a picture that its crop leaves out: {sum(losses) / len(losses):.1f} % on average, "
            f"{max(losses):.1f} % at most.",
            230,
            partial(_histogram, losses, 24, None, lambda v: f"{v:.3g} %"),
        ),
    ]
    if tokens:
        long = sum(count > MAX_TOKENS for count in tokens)
        found.append(
            Chart(
                "Caption length",
                f"In tokens; both encoders read {MAX_TOKENS}. {_percent(long, len(tokens))} are longer.",
                230,
                partial(_histogram, [float(t) for t in tokens], 24, float(MAX_TOKENS), lambda v: f"{v:.0f}"),
            )
        )
    return found


def _heat_map(sizes: Sequence[Size], canvas: Canvas, left: float, top: float, width: float) -> None:
    """Pictures per cell of width and height, as in the paper's Figure 2, darker for more."""
    if not sizes:
        canvas.text(left, top + 20, "no picture could be read", colour=FAINT)
        return
    sides = sorted(max(size) for size in sizes)
    most = max(2 * PAPER_SIDE, sides[min(len(sides) - 1, int(0.99 * len(sides)))])
    step = int(_round_step(most, 6))
    most = math.ceil(most / step) * step
    side = min(420.0, width - 160)
    x0, y0, cell = left + 56, top + 6, side / CELLS
    counts = Counter((min(CELLS - 1, h * CELLS // most), min(CELLS - 1, w * CELLS // most)) for h, w in sizes)
    highest = max(counts.values())
    canvas.rect(x0, y0, side, side, "#f7f9fb")
    for (row, column), count in counts.items():
        wide, high = (f"{n * most // CELLS}-{(n + 1) * most // CELLS}" for n in (column, row))
        hint = f"{count}: {wide} wide, {high} high"
        canvas.rect(x0 + column * cell, y0 + row * cell, cell, cell, _shade(count, highest), hint)
    for value in range(0, most + 1, step):
        place = side * value / most
        more = "+" if value == most and sides[-1] > most else ""
        canvas.text(x0 + place, y0 + side + 12, f"{value}{more}", size=11, anchor="middle", colour=FAINT)
        canvas.text(x0 - 6, y0 + place, f"{value}{more}", size=11, anchor="end", colour=FAINT)
    limit = side * PAPER_SIDE / most
    canvas.line(x0 + limit, y0, x0 + limit, y0 + side, "#000000", dashed=True)
    canvas.line(x0, y0 + limit, x0 + side, y0 + limit, "#000000", dashed=True)
    canvas.text(x0 + side / 2, y0 + side + 30, "width", anchor="middle")
    canvas.text(left, y0 + 6, "height")
    _legend(canvas, x0 + side + 24, y0, highest)


def _legend(canvas: Canvas, x: float, y: float, highest: int) -> None:
    canvas.text(x, y + 6, "pictures")
    counts = sorted({max(1, round(highest ** (i / 5))) for i in range(6)})
    for place, count in enumerate(counts):
        canvas.rect(x, y + 20 + 20 * place, 16, 16, _shade(count, highest))
        canvas.text(x + 22, y + 28 + 20 * place, str(count), size=11, colour=FAINT)


def _shade(count: int, highest: int) -> str:
    """From light to dark blue, by the logarithm, so that rare sizes are seen too."""
    share = 0.15 + 0.85 * math.log1p(count) / math.log1p(highest)
    ends = ((0xF7, 0xF9, 0xFB), (0x0B, 0x2A, 0x5B))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends, strict=True))


def _buckets(
    repeats: Sequence[BucketRepeats], batch: int | None, canvas: Canvas, left: float, top: float, width: float
) -> None:
    highest = max(r.pictures for r in repeats)
    room = width - 90 - (170 if batch else 70)
    if batch:
        canvas.text(left + width, top + 4, "last batch", size=11, anchor="end", colour=FAINT)
    for place, r in enumerate(repeats):
        y = top + 14 + 17 * place
        canvas.text(left + 82, y + 7, f"{r.bucket[0]}x{r.bucket[1]}", size=11, anchor="end", colour=FAINT)
        length = max(1.0, room * r.pictures / highest)
        canvas.rect(left + 90, y, length, 13, BAR, f"{r.pictures} pictures, {r.batches} batches")
        canvas.text(left + 96 + length, y + 7, str(r.pictures), size=11)
        if batch:
            fill = (r.over or batch) / batch
            canvas.rect(left + width - 60, y + 2, 60, 9, RULE)
            canvas.rect(
                left + width - 60,
                y + 2,
                60 * fill,
                9,
                MARK if fill < 1 else BAR,
                f"{r.over or batch} of {batch}",
            )


def _histogram(
    values: Sequence[float],
    bins: int,
    mark: float | None,
    label: Callable[[float], str],
    canvas: Canvas,
    left: float,
    top: float,
    width: float,
) -> None:
    """Bars of equal width from the least to the greatest value; ``mark`` is a line that a bar ends at."""
    low, high = min(values), max(values)
    if mark is not None:
        low, high = min(low, mark), max(high, mark)
    span = (high - low) or 1.0
    step = span / bins
    if mark is not None:  # a bin must not have values from both sides of the line
        low = mark - math.ceil((mark - low) / step - 1e-9) * step
    counts = Counter(_bin(value, low, step, mark) for value in values)
    last = max(*counts, math.ceil((high - low) / step - 1e-9) - 1, bins - 1)
    highest = max(counts.values())
    x0, base, room, tall = left + 48, top + 180, width - 60, 165.0
    each = room / (last + 1)
    rise = max(1, int(_round_step(highest, 4)))
    for count in range(0, highest + 1, rise):
        y = base - tall * count / highest
        canvas.line(x0, y, x0 + room, y, RULE)
        canvas.text(x0 - 6, y, str(count), size=11, anchor="end", colour=FAINT)
    for place, count in counts.items():
        height = max(1.0, tall * count / highest)
        hint = f"{count}: {label(low + place * step)} to {label(low + (place + 1) * step)}"
        canvas.rect(x0 + place * each + 1, base - height, each - 2, height, BAR, hint)
    gap = _round_step((last + 1) * step, 6)
    for number in range(math.ceil(low / gap - 1e-9), math.floor((low + (last + 1) * step) / gap + 1e-9) + 1):
        x = x0 + (number * gap - low) / step * each
        canvas.text(x, base + 14, label(number * gap), size=11, anchor="middle", colour=FAINT)
    if mark is not None:
        x = x0 + (mark - low) / step * each
        canvas.line(x, base - tall - 8, x, base, MARK, dashed=True)
        canvas.text(x + 4, base - tall - 4, label(mark), size=11, colour=MARK)


def _bin(value: float, low: float, step: float, mark: float | None) -> int:
    """Values on the line are left of it: a scale of 1 is not enlarged, 75 tokens are read."""
    place = (value - low) / step
    if mark is not None:
        return max(0, math.ceil(place - 1e-9) - 1)
    return max(0, int(place - 1e-9))


def _round_step(span: float, ticks: int) -> float:
    """1, 2 or 5 times a power of ten, for about that many ticks."""
    raw = span / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= raw * (1 - 1e-9))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"
