"""Pieces of a report in HTML: one file, nothing from elsewhere, readable by day and by night and on paper."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from sdxl_cli import __version__
from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.console import Cell, format_cell
from sdxl_cli.inspection.sheets import Sheet
from sdxl_cli.inspection.statistics import Histogram, Statistics

_LARGEST_PNG = 40_000
"""Bytes; larger pictures become JPEG."""
SERIES = ("--one", "--two", "--three", "--four", "--five", "--six")
"""Colours of lines."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --faint: #66707f; --rule: #dde2e9; --ground: #fff; --card: #f6f8fa;
  --one: #2f6fde; --two: #d9622b; --three: #2a9d62; --four: #8b5cc7; --five: #b8860b; --six: #c2356b;
  --good: #1f8a4c; --bad: #c62f2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --faint: #98a2b1; --rule: #333b47; --ground: #14181e;
  --card: #1c222a; --one: #6ea1ff; --two: #ff9a5c; --three: #57c98d; --four: #b99af0; --five: #e0b64a; --six: #f47ba8;
  --good: #57c98d; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; color: var(--ink); background: var(--ground);
  max-width: 1080px; margin: 2.2em auto 4em; padding: 0 1.2em; }
h1 { font-size: 1.55em; line-height: 1.25; margin: 0; } h2 { margin: 2.4em 0 .3em; font-size: 1.2em; }
p { margin: .4em 0; max-width: 76ch; } p.whole { max-width: none; } .says, footer, figcaption { color: var(--faint); }
.scroll { overflow-x: auto; margin: .8em 0; }
table { border-collapse: collapse; font-size: .93em; }
td, th { padding: .25em 1em .25em 0; border-bottom: 1px solid var(--rule); text-align: left; white-space: nowrap; }
th { color: var(--faint); font-weight: 600; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8em; margin: 1.3em 0; }
.cards div { background: var(--card); border-top: 3px solid var(--one); padding: .55em .9em;
  border-radius: 0 0 5px 5px; }
.cards div.good { border-color: var(--good); } .cards div.bad { border-color: var(--bad); }
.cards b { display: block; font-size: 1.3em; overflow-wrap: anywhere; }
.cards div.bad b { color: var(--bad); } .cards span { color: var(--faint); font-size: .87em; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.2em; margin: 1em 0; }
figure { margin: 0; } figcaption { font-size: .82em; line-height: 1.35; overflow-wrap: anywhere; }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 1.3em 2em;
  margin: 1em 0; } .row.wide { grid-column: 1 / -1; }
.row > p { font-size: .87em; margin: 0 0 .25em; overflow-wrap: anywhere; }
.cells { display: flex; gap: 8px; } .cells figure { flex: 0 1 auto; min-width: 0; }
.cells img, .whole img { max-width: 100%; height: auto; border-radius: 3px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--faint); font-size: 11px; }
.bar { fill: var(--one); opacity: .8; } .axis { stroke: var(--rule); } .curve { fill: none; stroke-width: 1.8; }
.mark { stroke: var(--bad); stroke-dasharray: 4 4; } footer { margin-top: 3em; font-size: .87em; }
@media print { h2, figure, .row { break-inside: avoid; } }
"""


def write_page(path: Path, title: str, lead: str, parts: Iterable[str], *, overwrite: bool = False) -> None:
    """Write a report.

    Args:
        path: an .html file.
        title: its heading.
        lead: a sentence below it.
        parts: HTML, one below the other.
        overwrite: whether the file may be replaced.

    Raises:
        FileError: it is there already, or cannot be written.
    """
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="says">{escape(lead)}</p>\n'
        + "\n".join(part for part in parts if part)
        + f"\n<footer>sdxl {__version__}</footer>\n</body></html>\n"
    )
    with atomic_write(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def heading(text: str, says: str = "") -> str:
    """A section's heading, and a sentence about what is in it."""
    return f"<h2>{escape(text)}</h2>" + (f'<p class="says">{escape(says)}</p>' if says else "")


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def cards(values: Mapping[str, tuple[str, str]]) -> str:
    """Large numbers: what they are -> (number, ``good``, ``bad`` or nothing)."""
    made = (
        f'<div class="{kind}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, (value, kind) in values.items()
    )
    return f'<div class="cards">{"".join(made)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Rows as a table; columns of numbers to the right."""
    body = list(rows)
    right = [
        all(isinstance(row[i], int | float) or row[i] is None or str(row[i])[:1].isdigit() for row in body)
        and i > 0
        for i in range(len(head))
    ]

    def line(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=n' if r else ''}>{escape(c)}</{tag}>"
                for c, r in zip(cells, right, strict=True)
            )
            + "</tr>"
        )

    lines = "".join(line([format_cell(cell) for cell in row], "td") for row in body)
    return f'<div class="scroll"><table>{line(head, "th")}{lines}</table></div>'


def pictures(sheet: Sheet) -> str:
    """The strips of a sheet, each with its label above."""
    rows = []
    for strip in sheet.strips:
        cells = "".join(
            f'<figure><img alt="" src="{embedded(image)}" width="{image.width}" height="{image.height}">'
            f"<figcaption>{escape(title)}</figcaption></figure>"
            for title, image in zip(sheet.titles, strip.cells, strict=True)
        )
        kind = "row wide" if len(strip.cells) > 3 else "row"
        rows.append(f'<div class="{kind}"><p>{escape(strip.label)}</p><div class="cells">{cells}</div></div>')
    return heading(sheet.title, sheet.says) + f'<div class="rows">{"".join(rows)}</div>'


def whole(image: Image.Image, alt: str) -> str:
    """One large picture."""
    return f'<p class="whole"><img alt="{escape(alt)}" src="{embedded(image)}"></p>'


def embedded(image: Image.Image) -> str:
    """A picture as the address of itself: PNG, or JPEG where that is large."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    kind = "png"
    if buffer.tell() > _LARGEST_PNG:
        buffer, kind = io.BytesIO(), "jpeg"
        image.convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def charts(figures: Iterable[tuple[str, str]]) -> str:
    """Small drawings side by side: (SVG, what it shows)."""
    made = (f"<figure>{svg}<figcaption>{escape(says)}</figcaption></figure>" for svg, says in figures)
    return f'<div class="charts">{"".join(made)}</div>'


def histogram(values: Statistics) -> str:
    """Counts as bars, and the Gaussian of the same mean and deviation as a line; empty where there are none."""
    found: Histogram = values.histogram
    if not values.count or not found.width > 0:
        return ""
    width, height, base = 320.0, 120.0, 104.0
    shares = [count / values.count for count in found.counts]
    places = [found.low + found.width * (index + 0.5) for index in range(len(shares))]
    gauss = [
        found.width
        / (values.std * math.sqrt(2 * math.pi))
        * math.exp(-(((at - values.mean) / values.std) ** 2) / 2)
        for at in places
    ]
    top = max(*shares, *gauss)
    each = width / len(shares)
    bars = "".join(
        f'<rect class="bar" x="{i * each:.2f}" y="{base - 96 * s / top:.2f}" width="{each * 0.9:.2f}" '
        f'height="{96 * s / top:.2f}"><title>{places[i]:.3g}: {100 * s:.2f} %</title></rect>'
        for i, s in enumerate(shares)
        if s
    )
    points = " ".join(f"{(i + 0.5) * each:.2f},{base - 96 * g / top:.2f}" for i, g in enumerate(gauss))
    ticks = "".join(
        f'<text x="{width * place:.1f}" y="{height - 3}" text-anchor="{anchor}">'
        f"{found.low + found.width * len(shares) * place:.3g}</text>"
        for place, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{bars}'
        f'<polyline class="curve" stroke="var(--two)" points="{points}"/>'
        f'<path class="axis" d="M0 {base}H{width:g}"/>{ticks}</svg>'
    )


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    logarithmic: bool = False,
    across: str = "",
    flipped: bool = False,
) -> str:
    """Lines over one axis: name -> (x, y); points that are not finite, or not above 0 on a logarithmic axis, are gaps.

    Args:
        series: at most six.
        logarithmic: of the vertical axis.
        across: what the horizontal axis is.
        flipped: whether the horizontal axis runs from high to low, as noise does in a generation.
    """
    usable = {
        name: [
            (x, math.log10(y) if logarithmic else y)
            for x, y in points
            if math.isfinite(y) and (y > 0 or not logarithmic)
        ]
        for name, points in series.items()
    }
    every = [point for points in usable.values() for point in points]
    if not every:
        return ""
    width, height, left, bottom, top = 460.0, 250.0, 46.0, 36.0, 10.0 + 16 * ((len(series) + 2) // 3)
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    y0, y1 = min(y for _, y in every), max(y for _, y in every)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (x - x0) / (x1 - x0)
        across_ = (1 - share if flipped else share) * (width - left - 12)
        return left + across_, height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top)

    parts = []
    for step in range(5):
        y = y0 + (y1 - y0) * step / 4
        place = at(x0, y)[1]
        value = 10**y if logarithmic else y
        parts.append(f'<path class="axis" d="M{left} {place:.1f}H{width - 12}"/>')
        parts.append(f'<text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for x, anchor in ((x0, "end" if flipped else "start"), (x1, "start" if flipped else "end")):
        parts.append(
            f'<text x="{at(x, y0)[0]:.1f}" y="{height - bottom + 15}" text-anchor="{anchor}">{x:.4g}</text>'
        )
    parts.append(
        f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">{escape(across)}</text>'
    )
    for number, (name, points) in enumerate(usable.items()):
        colour = f"var({SERIES[number % len(SERIES)]})"
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*point) for point in points))
        parts.append(f'<polyline class="curve" stroke="{colour}" points="{path}"/>')
        x, y = left + (number % 3) * 140, 10 + 16 * (number // 3)
        parts.append(f'<path d="M{x} {y}h18" class="curve" stroke="{colour}"/>')
        parts.append(f'<text x="{x + 23}" y="{y + 4}">{escape(name)}</text>')
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>'


def levels(rows: Sequence[tuple[str, float]], limit: float) -> str:
    """Bars on a logarithmic axis beside a limit: (name, value); what is beyond it is coloured."""
    width, each = 760.0, 19.0
    high = max([limit * 10, *(value for _, value in rows if math.isfinite(value))])
    low = max(1e-6, min([limit / 100, *(value for _, value in rows if value > 0 and math.isfinite(value))]))
    left, room = 330.0, width - 330.0 - 80

    def at(value: float) -> float:
        return (
            room
            * (math.log10(min(max(value, low), high)) - math.log10(low))
            / (math.log10(high) - math.log10(low))
        )

    parts = []
    for index, (name, value) in enumerate(rows):
        y = index * each + 16
        colour = "var(--bad)" if value > limit else "var(--one)"
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="{left}" y="{y + 2}" width="{max(1.0, at(value)):.1f}" height="13" fill="{colour}"/>'
        )
        parts.append(f'<text x="{left + at(value) + 5:.1f}" y="{y + 12}">{value:.4g}</text>')
    height = len(rows) * each + 22
    x = left + at(limit)
    parts.append(f'<path class="mark" d="M{x:.1f} 12V{height - 4}"/>')
    parts.append(f'<text x="{x:.1f}" y="10" text-anchor="middle">{limit:g}</text>')
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>'
