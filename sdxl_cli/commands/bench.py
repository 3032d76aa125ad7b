"""``sdxl bench``: how fast this machine is at each part of the work, and how far from what it can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli import console as consoles
from sdxl_cli import presets
from sdxl_cli.commands import _sampling as flags
from sdxl_cli.commands._options import Json, Quiet
from sdxl_cli.errors import unknown

if TYPE_CHECKING:
    from sdxl_cli.bench.run import Bench, Row
    from sdxl_cli.console import Cell, Console

PANEL = "Inspect"

_GIB = 1 << 30


def command(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="File, folder or name, as for sdxl generate; with --random-weights base, refiner or tiny.",
            metavar="FILE",
            rich_help_panel=flags.MODEL,
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Random numbers of the model's size instead of a file: just as fast.",
            rich_help_panel=flags.MODEL,
        ),
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(help="Of the pictures; default: what the model was trained on.", metavar="WxH"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures at once.", metavar="N")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps of a whole picture.", metavar="N")] = 30,
    only: Annotated[
        str | None,
        typer.Option(
            help="Some rows: text, unet, decode, encode, image, train; commas between.", metavar="NAMES"
        ),
    ] = None,
    negative: Annotated[
        bool, typer.Option("--negative", help="With a negative prompt, which costs a little more.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Timed runs of each row.", metavar="N")] = 5,
    budget: Annotated[
        float, typer.Option(help="Seconds after which a row is not run again.", metavar="SECONDS")
    ] = 60.0,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    vae_dtype: flags.VaeDtype = None,
    winograd: flags.Winograd = None,
    prepack: flags.Prepack = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Of the CPU; default: one per core.", metavar="N", rich_help_panel=flags.MACHINE),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time each part of the work on this machine: speed, memory, share of what is possible."""
    given = {
        key: value
        for key, value in locals().items()
        if key not in ("quiet", "as_json", "only") and value is not None
    }
    console = consoles.configure(quiet=quiet, json=as_json)

    from sdxl_cli.bench.cases import CASES
    from sdxl_cli.bench.machine import machine
    from sdxl_cli.bench.run import Bench
    from sdxl_cli.bench.setting import BenchRequest, settle

    names = [name.strip() for name in only.split(",")] if only else []
    for name in names:
        if name not in CASES:
            raise unknown("row in --only", name, CASES)
    request = presets.from_table(BenchRequest, {**given, "only": names}, "flags")
    setting = settle(request, console)
    bench = Bench(setting, console)
    rows = []
    for row in bench.rows():
        console.note(_said(row))
        rows.append(row)
    where = machine(setting.weights.device)
    _show(rows, bench, where, console)


def _said(row: Row) -> str:
    """A line on stderr while the others are still running."""
    if row.seconds is None:
        return f"{row.label}: left out, {row.left_out}"
    return f"{row.label}: {row.seconds.median:.4g} s"


def _show(rows: list[Row], bench: Bench, where: dict[str, Any], console: Console) -> None:
    setting = bench.setting
    height, width = setting.size
    text = ", ".join(f"{key} {value}" for key, value in where.items() if key not in ("memory", "gpu memory"))
    console.table(
        ["part", "dtype", "seconds", "from", "to", "per second", "memory GiB", "TFLOP", "TFLOP/s", "of peak"],
        [_cells(row) for row in rows],
        title=f"{setting.files.name}, {width}x{height}, batch {setting.request.batch}: {text}",
    )
    peaks = {_name(dtype): rate for dtype, rate in bench.ceilings.items()}
    for name, rate in peaks.items():
        console.print_result(f"peak, plain matrix products in {name}: {rate / 1e12:.4g} TFLOP/s")
    console.json(
        {
            "model": setting.files.name,
            "random_weights": setting.request.random_weights,
            "size": f"{width}x{height}",
            "batch": setting.request.batch,
            "steps": setting.plan.steps,
            "device": str(setting.weights.device),
            "machine": where,
            "peak": peaks,
            "rows": [row.to_json() for row in rows],
        }
    )


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _cells(row: Row) -> list[Cell]:
    if row.seconds is None:
        return [row.label, row.dtype, f"not run: {row.left_out}", *[None] * 7]
    assert row.memory is not None
    seconds = row.seconds
    return [
        row.label,
        row.dtype,
        *(f"{value:.4g}" for value in (seconds.median, seconds.low, seconds.high)),
        f"{row.per_second:.3g} {row.unit}",
        f"{row.memory.most / _GIB:.2f}",
        f"{row.flops / 1e12:.4g}",
        f"{row.rate / 1e12:.3g}",
        f"{row.of_ceiling:.0%}",
    ]
