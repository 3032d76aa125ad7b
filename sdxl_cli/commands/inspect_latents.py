"""``sdxl inspect-latents``: numbers and pictures of what an autoencoder makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Json, Quiet
from sdxl_cli.console import Cell, Console
from sdxl_cli.errors import NumericError

if TYPE_CHECKING:
    from sdxl_cli.inspection.latents import LatentReport

PANEL = "Inspect"


def command(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Pictures, folders of them, manifests of bucket-dataset, latent caches, or .safetensors of latents.",
            metavar="INPUT...",
            show_default=False,
        ),
    ],
    vae: Annotated[
        str | None,
        typer.Option(
            "--vae",
            "--model",
            "-m",
            help="Autoencoder, or model that has one.",
            metavar="FILE",
            show_default="the released one, else the bundled one",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the sheets and the report.", metavar="DIR"),
    ] = None,
    limit: Annotated[
        int,
        typer.Option("--limit", help="How many to look at, evenly spread; 0 for all.", metavar="N", min=0),
    ] = 1000,
    max_side: Annotated[
        int,
        typer.Option(
            "--max-side",
            help="Shrink larger picture files to this many pixels; 0 never.",
            metavar="N",
            min=0,
        ),
    ] = 1024,
    scale_factor: Annotated[
        float | None,
        typer.Option(
            "--scale-factor", help="Check this one.", metavar="X", show_default="the autoencoder's", min=0.0
        ),
    ] = None,
    scaled: Annotated[
        bool,
        typer.Option("--scaled", help="Latents in .safetensors are times the scale factor already."),
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", metavar="NAME")
    ] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure latents: range, scale, outliers, NaN; and how well pictures survive.

    Exits with 4 when a latent or a reconstruction has NaN or infinite values; the report is given all the same.
    """
    from sdxl_cli.generation.device import pick_device
    from sdxl_cli.inspection.latents import InspectRequest, inspect_latents

    console = consoles.configure(quiet=quiet, json=as_json)
    request = InspectRequest(
        inputs=tuple(inputs),
        vae=vae,
        output=output,
        limit=limit,
        max_side=max_side,
        scale_factor=scale_factor,
        latents_are_scaled=scaled,
        device=str(pick_device(device)),
    )
    report = inspect_latents(request)
    _show(console, report)
    console.json(report)
    if report.not_finite:
        names = ", ".join(report.not_finite[:3]) + (" …" if len(report.not_finite) > 3 else "")
        raise NumericError(
            f"NaN or infinity in {len(report.not_finite)} of {report.inspected}: {names}; encode them in fp32"
        )


def _show(console: Console, report: LatentReport) -> None:
    """The numbers as tables and sentences."""
    scale = report.scale_factor
    noise = report.posterior_std or [None] * len(report.channels)
    named = [(str(index), channel, noise[index]) for index, channel in enumerate(report.channels)]
    rows: list[list[Cell]] = [
        [
            name,
            values.mean,
            values.std,
            values.minimum,
            values.maximum,
            f"{100 * values.outliers:.3f} %",
            spread,
            values.std * scale,
            1 / values.std if values.std else None,
            values.non_finite,
        ]
        for name, values, spread in [*named, ("all", report.together, None)]
    ]
    columns = [
        "channel",
        "mean",
        "std",
        "min",
        "max",
        "outliers",
        "posterior std",
        f"std x {scale:g}",
        "1/std",
    ]
    console.table([*columns, "NaN, inf"], rows)
    names = [str(index) for index in range(len(report.channels))]
    console.table(
        ["correlation", *names], [[name, *row] for name, row in zip(names, report.correlation, strict=True)]
    )
    verdict = "fits" if report.scale_fits else "does not fit"
    console.print_result(
        f"{report.inspected} of {report.found}: std x scale factor is {report.scaled_std:.3f}, so {scale:g} {verdict}; "
        f"1/std is {report.measured_scale_factor:.5f}"
    )
    if report.mean_psnr is not None:
        worst = report.reconstructions[0]
        console.print_result(
            f"reconstruction: {report.mean_psnr:.2f} dB on average, {worst.psnr:.2f} dB at worst ({worst.name})"
        )
    for path in report.files:
        console.print_result(str(path))
