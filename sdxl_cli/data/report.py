"""A manifest as something to look at: one HTML file without anything from elsewhere, or a sheet as SVG or PNG."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image, ImageDraw

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.data.canvas import FONT, Canvas, PixelCanvas, SvgCanvas
from sdxl_cli.data.charts import BAR, FAINT, INK, MARK, RULE, Chart, charts
from sdxl_cli.data.hygiene import Hygiene, Refused, open_picture
from sdxl_cli.data.manifest import FATES, Manifest, Row
from sdxl_cli.data.remainder import effective_repeats
from sdxl_cli.data.storage import open_storage
from sdxl_cli.data.summary import Summary, summarise
from sdxl_cli.errors import UsageError

C = TypeVar("C", bound=Canvas)
Kind = Literal["html", "svg", "png"]
KINDS: dict[str, Kind] = {".html": "html", ".htm": "html", ".svg": "svg", ".png": "png"}
WIDTH, MARGIN = 900, 30
THUMB = 120
"""Longest side of a small picture, in pixels."""
PER_FATE = 6
"""Small pictures of every reason to be left out."""
EXAMPLES = 8
"""Small pictures of the most enlarged and of the most cut."""


def kind_of(path: Path) -> Kind:
    """What the name's ending asks for.

    Raises:
        UsageError: it is none of the three.
    """
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path}: a report is .html, .svg or .png")
    return KINDS[path.suffix.lower()]


def write_report(
    path: Path, manifest: Manifest, notes: Sequence[str] = (), *, overwrite: bool = False
) -> None:
    """Write the report that the name's ending asks for; HTML has the tables and small pictures too.

    Raises:
        FileError: the file exists and ``overwrite`` is not set, or cannot be written.
        UsageError: see :func:`kind_of`.
    """
    kind = kind_of(path)
    with atomic_write(path, overwrite=overwrite) as temporary:
        if kind == "html":
            temporary.write_text(_html(manifest, notes), encoding="utf-8")
        elif kind == "svg":
            temporary.write_text(_sheet(manifest, SvgCanvas).svg(), encoding="utf-8")
        else:
            _sheet(manifest, PixelCanvas).image.save(temporary)


def _sheet(manifest: Manifest, new: Callable[[int, int], C]) -> C:
    """All charts below each other."""
    shown = charts(manifest)
    canvas = new(WIDTH + 2 * MARGIN, sum(chart.height + 70 for chart in shown) + 2 * MARGIN)
    top = float(MARGIN)
    for chart in shown:
        canvas.text(MARGIN, top + 8, chart.title, size=17, colour=INK)
        for place, line in enumerate(textwrap.wrap(chart.says, 130)):
            canvas.text(MARGIN, top + 30 + 16 * place, line, size=12, colour=FAINT)
        chart.draw(canvas, MARGIN, top + 60, WIDTH)
        top += chart.height + 70
    return canvas


_STYLE = f"""
body {{ font: 15px/1.5 {FONT}; color: {INK}; background: #fff; max-width: {WIDTH}px; margin: 2em auto;
  padding: 0 1em; }}
h1 {{ font-size: 1.6em; margin-bottom: 0; }} h2 {{ margin-top: 2em; font-size: 1.2em; }}
p.says, figcaption {{ color: {FAINT}; }} figcaption {{ font-size: 11px; line-height: 1.3; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2em .9em .2em 0; border-bottom: 1px solid {RULE}; text-align: left; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
.cards {{ display: flex; flex-wrap: wrap; gap: 1em; margin: 1.2em 0; padding: 0; }}
.cards div {{ border: 1px solid {RULE}; border-top: 3px solid {BAR}; padding: .5em 1em; }}
.cards b {{ display: block; font-size: 1.4em; }}
.thumbs {{ display: flex; flex-wrap: wrap; gap: 12px; }} figure {{ margin: 0; width: {THUMB + 10}px; }}
.none {{ width: {THUMB}px; height: 80px; display: flex; align-items: center; justify-content: center;
  background: {RULE}; color: {FAINT}; font-size: 11px; }}
svg {{ max-width: 100%; height: auto; }} code {{ font-size: .9em; }}
"""


def _html(manifest: Manifest, notes: Sequence[str]) -> str:
    summary = summarise(manifest.rows)
    parts = [
        f"<h1>{escape(str(manifest.root))}</h1>",
        f'<p class="says">{summary.kept} of {summary.pictures} pictures kept, {summary.crops} crops; '
        f"crop {manifest.config.crop}, seed {manifest.config.seed}"
        f"{', half of them mirrored' if manifest.config.flip else ''}.</p>",
        _cards(summary),
        *(f"<p>{escape(note)}</p>" for note in notes),
        *(_figure(chart) for chart in charts(manifest)),
        _repeats(manifest),
        _kept(manifest),
        _rejects(manifest, summary),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>sdxl bucket-dataset</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _cards(summary: Summary) -> str:
    left_out = summary.pictures - summary.kept
    values = {
        "kept": str(summary.kept),
        "left out": str(left_out),
        "buckets in use": str(len(summary.buckets)),
        "enlarged": str(summary.upscaled),
        "cut off, mean": f"{100 * summary.mean_crop_loss:.1f} %",
        "without caption": str(summary.without_caption),
        **{f"below {f.side} pixels": f"{100 * f.share:.1f} %" for f in summary.filters if f.pictures},
    }
    return '<div class="cards">' + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in values.items()) + "</div>"


def _figure(chart: Chart) -> str:
    canvas = SvgCanvas(WIDTH, chart.height)
    chart.draw(canvas, 0, 0, WIDTH)
    return f'<h2>{escape(chart.title)}</h2><p class="says">{escape(chart.says)}</p>{canvas.svg()}'


def _repeats(manifest: Manifest) -> str:
    config = manifest.config
    if config.batch_size is None:
        return ""
    rows = effective_repeats(manifest.rows, config.batch_size, config.remainder)
    head = ("bucket", "pictures", "batches", "left over", "filled", "dropped", "weight unequalised", "weight")
    body = [
        (
            f"{r.bucket[0]}x{r.bucket[1]}",
            *(r.pictures, r.batches, r.over, r.filled, r.dropped),
            f"{r.unequalised:.3f}",
            f"{r.effective:g}",
        )
        for r in rows
    ]
    return (
        f"<h2>An epoch in batches of {config.batch_size}</h2>"
        f'<p class="says">remainder = {config.remainder}. "Weight unequalised" is what a picture would count if every '
        'batch counted alike, however full; "weight" is what it counts.</p>' + _table(head, body)
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of numbers are aligned to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    right = [i > 0 and all(row[i][:1].isdigit() for row in body) for i in range(len(head))]

    def line(cells: Sequence[str], tag: str) -> str:
        pairs = zip(cells, right, strict=True)
        return (
            "<tr>"
            + "".join(f"<{tag}{' class=n' if r else ''}>{escape(c)}</{tag}>" for c, r in pairs)
            + "</tr>"
        )

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in body)}</table>"


def _kept(manifest: Manifest) -> str:
    """The pictures that suffer most, with their crops."""
    kept = [row for row in manifest.kept if row.crop == 0]
    enlarged = sorted((r for r in kept if r.plan.scale > 1), key=lambda r: -r.plan.scale)[:EXAMPLES]
    cut = sorted((r for r in kept if r.plan.crop_loss > 0), key=lambda r: -r.plan.crop_loss)[:EXAMPLES]
    parts = []
    for title, rows in (("Most enlarged", enlarged), ("Most cut", cut)):
        if rows:
            shown = "".join(
                _thumb(manifest, r, f"{r.plan.scale:.2f}x, {100 * r.plan.crop_loss:.0f} % cut") for r in rows
            )
            parts.append(
                f'<h2>{title}</h2><p class="says">The frame is what is kept.</p><div class="thumbs">{shown}</div>'
            )
    return "".join(parts)


def _rejects(manifest: Manifest, summary: Summary) -> str:
    if not summary.refused:
        return "<h2>Left out</h2><p>Nothing.</p>"
    parts = [
        "<h2>Left out</h2>",
        _table(("because", "pictures", ""), ((f, n, FATES[f]) for f, n in summary.refused.items())),
    ]
    for fate in summary.refused:
        rows = [row for row in manifest.rows if row.fate == fate][:PER_FATE]
        shown = "".join(_thumb(manifest, row, row.detail) for row in rows)
        parts.append(f'<h3>{fate}</h3><div class="thumbs">{shown}</div>')
    if summary.notes:
        parts += ["<h2>Noticed</h2>", _table(("what", "kept pictures"), summary.notes.items())]
    return "".join(parts)


def _thumb(manifest: Manifest, row: Row, says: str) -> str:
    caption = f"<figcaption>{escape(row.path)}<br>{escape(says)}</figcaption>"
    image = _small(manifest, row)
    if image is None:
        return f'<figure><div class="none">cannot be shown</div>{caption}</figure>'
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="" src="data:image/jpeg;base64,{data}">{caption}</figure>'


def _small(manifest: Manifest, row: Row) -> Image.Image | None:
    """The picture, small, with the frame of its crop; None when it cannot be decoded."""
    hygiene = Hygiene(
        background=manifest.config.hygiene.background,
        animated="first",
        max_pixels=manifest.config.hygiene.max_pixels,
    )
    try:
        image = open_picture(open_storage(manifest.root).read(row.path), hygiene).image
    except Refused:
        return None
    image.thumbnail((THUMB, THUMB))
    if row.kept:
        plan = row.plan
        by = image.width / plan.resized_size[1]
        top, left = plan.crop_top_left
        if plan.flipped:  # the crop is counted in the mirrored picture, the small one is not mirrored
            left = plan.resized_size[1] - plan.target_size[1] - left
        corners = (left, top, left + plan.target_size[1], top + plan.target_size[0])
        frame = [round(value * by) for value in corners]
        frame[2:] = [min(frame[2] - 1, image.width - 1), min(frame[3] - 1, image.height - 1)]
        ImageDraw.Draw(image).rectangle(frame, outline=MARK, width=2)
    return image
