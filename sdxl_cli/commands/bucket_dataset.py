"""``sdxl bucket-dataset``: pictures to a manifest of exact crops."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Config, Json, Quiet, Set
from sdxl_cli.errors import FileError, SdxlError, UsageError, unknown

if TYPE_CHECKING:
    from sdxl_cli.console import Cell, Console
    from sdxl_cli.data.manifest import DatasetConfig, Manifest, Row
    from sdxl_cli.data.remainder import BucketRepeats
    from sdxl_cli.data.scan import Engine
    from sdxl_cli.data.summary import Summary

PANEL = "Data"
DEFAULT_TABLE = "buckets-paper"
NOTES_SHOWN = 5


def command(
    images: Annotated[
        str,
        typer.Argument(
            help="Folder of pictures or WebDataset tars, a table (.jsonl, .csv, .parquet), a .tar, "
            "kohya's dataset .toml, or a URL that fsspec reads.",
            metavar="IMAGES",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Manifest to write: .parquet or .jsonl.", metavar="FILE")
    ] = Path("manifest.parquet"),
    report: Annotated[
        Path | None, typer.Option("--report", help="Also write charts: .html, .svg or .png.", metavar="FILE")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="Bucket table: a shipped preset or a TOML file.",
            metavar="NAME",
            show_default=DEFAULT_TABLE,
        ),
    ] = None,
    area: Annotated[
        str | None,
        typer.Option(help="Make a table of that many pixels: 1024x1024 or a number.", metavar="WxH"),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Sides of made buckets are multiples of it.", metavar="PIXELS", min=8)
    ] = None,
    min_bucket: Annotated[
        int | None,
        typer.Option(
            help="Shortest side of a made table.", metavar="PIXELS", show_default="half the root of the area"
        ),
    ] = None,
    max_bucket: Annotated[
        int | None,
        typer.Option(help="Longest side of a made table.", metavar="PIXELS", show_default="twice the root"),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            help="What a table's columns are: caption=NAME, file=NAME, image=NAME …; may be repeated.",
            metavar="ROLE=NAME",
        ),
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option(help="Where to cut: random or center.", metavar="POLICY", show_default="random"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides random crops and flips.", show_default="0")
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Mirror half of the crops.", show_default="no-flip"),
    ] = None,
    crops_per_image: Annotated[
        int | None,
        typer.Option(help="Crops of every picture; an epoch uses one.", metavar="K", show_default="1"),
    ] = None,
    max_upscale: Annotated[
        float | None,
        typer.Option(help="Leave out what would be enlarged more; 1 allows none.", metavar="X"),
    ] = None,
    no_upscale: Annotated[
        bool | None,
        typer.Option("--no-upscale", help="Enlarge nothing: small pictures get a bucket of their own size."),
    ] = None,
    min_side: Annotated[
        int | None, typer.Option(help="Leave out pictures with a shorter side.", metavar="PIXELS")
    ] = None,
    require_captions: Annotated[
        bool | None, typer.Option("--require-captions", help="Leave out pictures without a caption.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures per step, on all devices together.", metavar="N", min=1)
    ] = None,
    remainder: Annotated[
        str | None,
        typer.Option(
            help="What fills no batch: short, pad, merge or drop.", metavar="POLICY", show_default="short"
        ),
    ] = None,
    header_only: Annotated[
        bool, typer.Option("--header-only", help="Do not decode pictures: fast, and blind to damage.")
    ] = False,
    verify: Annotated[
        int, typer.Option(help="Prove for N rows that they regenerate their pixels.", metavar="N", min=0)
    ] = 0,
    workers: Annotated[
        int, typer.Option(help="Processes that open pictures; 0 takes all cores.", metavar="N", min=0)
    ] = 0,
    engine: Annotated[str, typer.Option(help="Where they run: local or ray.", metavar="NAME")] = "local",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing manifest.")] = False,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Sort pictures into aspect-ratio buckets and plan every crop.

    Every picture is opened; each gets a row in the manifest with the crop the model will be shown, exactly, or
    the reason why it is left out.
    """
    console = consoles.configure(quiet=quiet, json=as_json)
    flags: dict[str, object] = {
        "crop": crop,
        "seed": seed,
        "flip": flip,
        "crops_per_image": crops_per_image,
        "max_upscale": max_upscale,
        "no_upscale": no_upscale,
        "step": step,
        "min_side": min_side,
        "require_captions": require_captions,
        "batch_size": batch_size,
        "remainder": remainder,
        "check": "header" if header_only else None,
        **_columns(columns or []),
        **_grid(area, step, min_bucket, max_bucket, preset),
    }
    places = _Places(output, report, overwrite)
    manifest, notes = _scan(
        console, images, places, _Layers(preset, config, sets or [], flags), workers, _engine(engine)
    )
    _report(console, manifest, notes, places, verify)


def count_tokens(caption: str) -> tuple[int, int]:
    """Tokens of a caption for CLIP-L and for bigG, without start and end; both read the same vocabulary."""
    from sdxl_cli.generation.prompt import Tokenizer

    count = len(Tokenizer.default().encode(caption))
    return count, count


class _Places(NamedTuple):
    """What is written."""

    manifest: Path
    report: Path | None
    overwrite: bool

    def check(self) -> None:
        """Before any work is done: the names are of a known kind, and free."""
        from sdxl_cli.data.manifest import format_of
        from sdxl_cli.data.report import kind_of

        format_of(self.manifest)
        if self.report is not None:
            kind_of(self.report)
        for path in (self.manifest, self.report):
            if path is not None and path.exists() and not self.overwrite:
                raise FileError(f"{path} exists already; choose another name or give --overwrite")


class _Layers(NamedTuple):
    """Where the settings come from."""

    table: str | None
    """A preset that was asked for."""
    config: Path | None
    sets: list[str]
    flags: dict[str, object]

    def resolve(self, said: Sequence[str] = ()) -> DatasetConfig:
        """Flags over ``--set`` over what the source says over ``--config`` over the table.

        A source that says which buckets it wants is not heard when a table is asked for.
        """
        from sdxl_cli import presets
        from sdxl_cli.data.manifest import DatasetConfig

        made = "buckets.grid.area" in self.flags
        if made or self.table is not None:
            said = [text for text in said if not text.startswith("buckets.")]
        table = self.table or (None if made else DEFAULT_TABLE)
        return presets.layered(
            DatasetConfig, preset=table, config=self.config, sets=[*said, *self.sets], flags=self.flags
        )


def _columns(texts: Iterable[str]) -> dict[str, object]:
    from sdxl_cli.data.tables import ROLES

    found: dict[str, object] = {}
    for text in texts:
        role, equals, name = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--column {text}: expected ROLE=NAME, for example --column caption=prompt")
        if role not in ROLES:
            raise UsageError(f"--column {text}: {unknown('role', role, ROLES)}")
        found[f"columns.{role}"] = name
    return found


def _grid(
    area: str | None, step: int | None, least: int | None, most: int | None, preset: str | None
) -> dict[str, object]:
    """The settings of a table made by rule."""
    if area is None:
        if least is not None or most is not None:
            raise UsageError("--min-bucket and --max-bucket are for a table made with --area; give it too")
        return {}
    if preset is not None:
        raise UsageError(f"--area makes a table and --preset {preset} is one; give one of the two")
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", area.strip())
    if not match:
        raise UsageError(f"--area {area}: expected WIDTHxHEIGHT or a number of pixels, for example 1024x1024")
    pixels = int(match[1]) * int(match[2] or 1)
    side = math.isqrt(pixels)
    return {
        "buckets.grid.area": pixels,
        "buckets.grid.step": step,
        "buckets.grid.min_side": least or side // 2,
        "buckets.grid.max_side": most or side * 2,
    }


def _engine(name: str) -> Engine:
    engines: dict[str, Engine] = {"local": "local", "ray": "ray"}
    if name not in engines:
        raise unknown("engine", name, engines)
    return engines[name]


def _scan(
    console: Console, images: str, places: _Places, layers: _Layers, workers: int, engine: Engine
) -> tuple[Manifest, Sequence[str]]:
    from sdxl_cli.data.manifest import Manifest, write_manifest
    from sdxl_cli.data.scan import finished, scan
    from sdxl_cli.data.sources import find

    places.check()
    found = find(images, layers.resolve().columns)
    settings = layers.resolve(found.settings)
    scanned = scan(
        found.root,
        found.items,
        settings,
        workers=workers or os.cpu_count() or 1,
        count_tokens=count_tokens,
        engine=engine,
    )
    rows: list[Row] = []
    for looked in console.progress(scanned, "opening pictures", total=len(found.items)):
        rows += looked
    manifest = Manifest(found.root, settings, finished(rows, settings))
    write_manifest(places.manifest, manifest, overwrite=places.overwrite)
    return manifest, found.notes


def _report(console: Console, manifest: Manifest, notes: Sequence[str], places: _Places, verify: int) -> None:
    from sdxl_cli.data.manifest import read_manifest
    from sdxl_cli.data.remainder import effective_repeats
    from sdxl_cli.data.report import write_report
    from sdxl_cli.data.scan import verify as verify_rows
    from sdxl_cli.data.summary import summarise

    _say(console, notes)
    summary = summarise(manifest.rows)
    config = manifest.config
    if places.report is not None:
        write_report(places.report, manifest, notes, overwrite=places.overwrite)
    if not summary.kept:
        _refusals(console, summary)
        raise SdxlError(
            f"none of {summary.pictures} pictures can be used; {places.manifest} says why for each"
        )
    _tables(console, summary)
    repeats = (
        effective_repeats(manifest.rows, config.batch_size, config.remainder) if config.batch_size else []
    )
    _repeats(console, repeats, config)
    checked, wrong = verify_rows(read_manifest(places.manifest), verify) if verify else (0, [])
    console.json(
        {
            "manifest": places.manifest,
            "report": places.report,
            "summary": summary,
            "repeats": repeats,
            "verified": checked,
            "mismatches": wrong,
        }
    )
    if wrong:
        raise SdxlError(
            f"{len(wrong)} of {checked} rows do not verify; first {wrong[0].path}: {wrong[0].what}"
        )
    if checked:
        console.print_result(f"verified: {checked} rows regenerate their pixels bit for bit")
    for path in (places.manifest, places.report):
        if path is not None:
            console.print_result(str(path))


def _say(console: Console, notes: Sequence[str]) -> None:
    for note in notes[:NOTES_SHOWN]:
        console.note(note)
    if len(notes) > NOTES_SHOWN:
        console.note(f"and {len(notes) - NOTES_SHOWN} more like these; --report lists them")


def _tables(console: Console, summary: Summary) -> None:
    rows: list[list[Cell]] = [
        [
            _name(b.size),
            round(b.size[0] / b.size[1], 3),
            b.pictures,
            _percent(b.share),
            b.upscaled,
            _percent(b.crop_loss),
        ]
        for b in summary.buckets
    ]
    console.table(["bucket (h x w)", "h/w", "pictures", "share", "enlarged", "cut off"], rows)
    _refusals(console, summary)
    console.print_result(
        f"{summary.kept} of {summary.pictures} pictures kept, {summary.crops} crops; "
        f"{summary.upscaled} enlarged (at most {summary.largest_scale:.2f} times); "
        f"cut off {_percent(summary.mean_crop_loss)} on average, {_percent(summary.largest_crop_loss)} at most"
    )
    lost = ", ".join(f"{_percent(f.share)} at {f.side}" for f in summary.filters if f.pictures)
    console.print_result(
        f"a minimum size would have thrown away: {lost} pixels (the paper's data: 39 % at 256)"
        if lost
        else "a minimum size would have thrown away nothing"
    )
    if summary.long_captions:
        console.warn(
            f"{summary.long_captions} captions have more than 75 tokens; the encoders do not see the rest"
        )
    if summary.without_caption:
        console.warn(
            f"{summary.without_caption} kept pictures have no caption; training refuses them unless made with "
            "--require-captions"
        )


def _repeats(console: Console, repeats: Sequence[BucketRepeats], config: DatasetConfig) -> None:
    """Buckets that do not fill whole batches."""
    uneven = [r for r in repeats if r.over]
    if not uneven:
        return
    rows: list[list[Cell]] = [
        [
            _name(r.bucket),
            r.pictures,
            r.batches,
            r.over,
            r.filled,
            r.dropped,
            round(r.unequalised, 3),
            r.effective,
        ]
        for r in uneven
    ]
    columns = [
        "bucket (h x w)",
        "pictures",
        "batches",
        "left over",
        "filled",
        "dropped",
        "weight unequalised",
        "weight",
    ]
    console.table(
        columns, rows, title=f"an epoch in batches of {config.batch_size}, remainder = {config.remainder}"
    )
    if never := sum(r.pictures for r in repeats if not r.batches):
        console.warn(
            f"{never} pictures are in buckets without a whole batch and are never shown; choose another remainder"
        )


def _refusals(console: Console, summary: Summary) -> None:
    from sdxl_cli.data.manifest import FATES

    if summary.refused:
        console.table(
            ["left out", "pictures", "because"], [[f, n, FATES[f]] for f, n in summary.refused.items()]
        )
    if summary.notes:
        console.table(["noticed", "pictures"], [[name, count] for name, count in summary.notes.items()])


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
