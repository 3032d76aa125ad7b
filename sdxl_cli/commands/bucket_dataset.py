"""``sdxl bucket-dataset``: a folder of pictures to a manifest of exact crops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Config, Json, Quiet, Set
from sdxl_cli.errors import FileError, SdxlError

if TYPE_CHECKING:
    from sdxl_cli.console import Cell, Console
    from sdxl_cli.data.manifest import DatasetConfig, Manifest, Row
    from sdxl_cli.data.report import Summary

PANEL = "Data"


def command(
    images: Annotated[Path, typer.Argument(help="Folder of pictures.", metavar="IMAGES", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Manifest to write: .parquet or .jsonl.", metavar="FILE")
    ] = Path("manifest.parquet"),
    preset: Annotated[
        str, typer.Option("--preset", help="Bucket table: a shipped preset or a TOML file.", metavar="NAME")
    ] = "buckets-paper",
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
    min_side: Annotated[
        int | None, typer.Option(help="Leave out pictures with a shorter side.", metavar="PIXELS")
    ] = None,
    require_captions: Annotated[
        bool | None, typer.Option("--require-captions", help="Leave out pictures without a caption.")
    ] = None,
    verify: Annotated[
        int, typer.Option(help="Prove for N rows that they regenerate their pixels.", metavar="N")
    ] = 0,
    workers: Annotated[int, typer.Option(help="Threads that read pictures.", metavar="N", min=1)] = 2,
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
        "min_side": min_side,
        "require_captions": require_captions,
    }
    manifest = _scan(
        console, images, output, _settings(preset, config, sets, flags), workers, overwrite=overwrite
    )
    _report(console, manifest, output, verify)


def _settings(
    preset: str, config: Path | None, sets: list[str] | None, flags: dict[str, object]
) -> DatasetConfig:
    from sdxl_cli import presets
    from sdxl_cli.data.manifest import DatasetConfig

    return presets.layered(DatasetConfig, preset=preset, config=config, sets=sets or (), flags=flags)


def _scan(
    console: Console, images: Path, output: Path, settings: DatasetConfig, workers: int, *, overwrite: bool
) -> Manifest:
    from sdxl_cli.data.manifest import Manifest, format_of, write_manifest
    from sdxl_cli.data.scan import scan
    from sdxl_cli.data.sources import find_items, own_tables

    format_of(output)
    if output.exists() and not overwrite:
        raise FileError(f"{output} exists already; choose another name or give --overwrite")
    items = find_items(images)
    if inner := own_tables(images):
        console.note(f"left out, because they are data sets of their own: {', '.join(inner)}")
    rows: list[Row] = []
    for found in console.progress(
        scan(images, items, settings, workers=workers), "opening pictures", total=len(items)
    ):
        rows += found
    manifest = Manifest(images, settings, tuple(rows))
    write_manifest(output, manifest, overwrite=overwrite)
    return manifest


def _report(console: Console, manifest: Manifest, output: Path, verify: int) -> None:
    from sdxl_cli.data import report
    from sdxl_cli.data.manifest import read_manifest
    from sdxl_cli.data.scan import verify as verify_rows

    summary = report.summarise(manifest.rows)
    if not summary.kept:
        _refusals(console, summary)
        raise SdxlError(f"none of {summary.pictures} pictures can be used; {output} says why for each")
    _tables(console, summary)
    checked, wrong = verify_rows(read_manifest(output), verify) if verify else (0, [])
    console.json({"manifest": output, "summary": summary, "verified": checked, "mismatches": wrong})
    if wrong:
        raise SdxlError(
            f"{len(wrong)} of {checked} rows do not verify; first {wrong[0].path}: {wrong[0].what}"
        )
    if checked:
        console.print_result(f"verified: {checked} rows regenerate their pixels bit for bit")
    console.print_result(str(output))


def _tables(console: Console, summary: Summary) -> None:
    rows: list[list[Cell]] = [
        [
            f"{b.size[0]}x{b.size[1]}",
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
    kept = summary.kept
    console.print_result(
        f"{kept} of {summary.pictures} pictures kept, {summary.crops} crops; "
        f"{summary.upscaled} enlarged (at most {summary.largest_scale:.2f} times); "
        f"cut off {_percent(summary.mean_crop_loss)} on average, {_percent(summary.largest_crop_loss)} at most"
    )
    console.print_result(
        f"{_percent(summary.below_256 / kept)} have a side below 256 pixels: kept, with their size as a condition, "
        "where a minimum size would have thrown them away"
    )
    if summary.without_caption:
        console.warn(
            f"{summary.without_caption} kept pictures have no caption; they are trained as unprompted"
        )


def _refusals(console: Console, summary: Summary) -> None:
    from sdxl_cli.data.manifest import FATES

    if summary.refused:
        console.table(
            ["left out", "pictures", "because"], [[f, n, FATES[f]] for f, n in summary.refused.items()]
        )
    if summary.notes:
        console.table(["noticed", "pictures"], [[name, count] for name, count in summary.notes.items()])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
