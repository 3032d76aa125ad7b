"""``sdxl eval reconstruction``: the paper's Table 3 for any autoencoder and any pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands import _measuring as shared
from sdxl_cli.commands._options import Json, Quiet

if TYPE_CHECKING:
    import torch

    from sdxl_cli.checkpoint.files import ModelFiles


def command(
    pictures: Annotated[
        Path,
        typer.Argument(
            help="Folder, table, tar or parquet of pictures.", metavar="PICTURES", show_default=False
        ),
    ],
    vae: Annotated[
        list[str] | None,
        typer.Option(
            "--vae",
            "--model",
            "-m",
            help="Autoencoder, or model that has one; may be repeated.",
            metavar="FILE",
            show_default="the released one, else the bundled one",
        ),
    ] = None,
    metrics: Annotated[
        str, typer.Option("--metrics", help="Some of psnr, ssim, lpips, rfid.", metavar="NAMES")
    ] = "psnr,ssim,lpips,rfid",
    size: shared.Size = 256,
    filter_name: shared.Filter = "bicubic",
    limit: shared.Limit = 0,
    posterior: Annotated[
        str, typer.Option("--posterior", help="Decode its mode, or a sample.", metavar="mode|sample")
    ] = "mode",
    vae_dtype: Annotated[
        str, typer.Option("--vae-dtype", help="auto (fp32), fp32, bf16 or fp16.", metavar="NAME")
    ] = "auto",
    batch_size: shared.BatchSize = 8,
    device: shared.Device = "auto",
    output: shared.Output = None,
    inception_weights: shared.InceptionWeights = None,
    resize: shared.Resize = "tf1",
    lpips_weights: shared.LpipsWeights = None,
    lpips_net: shared.LpipsNet = "vgg",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure what autoencoders make of pictures: PSNR, SSIM, LPIPS and rFID (the paper's Table 3)."""
    given = dict(locals())
    console = consoles.configure(quiet=quiet, json=as_json)

    from sdxl_cli.checkpoint.locate import locate
    from sdxl_cli.errors import UsageError
    from sdxl_cli.evaluation.networks import Networks
    from sdxl_cli.evaluation.pictures import open_pictures
    from sdxl_cli.evaluation.reconstruction import METRICS, POSTERIORS, reconstructed, reconstruction_scores
    from sdxl_cli.evaluation.scores import TABLE_3, Row, parse_metrics, write_results
    from sdxl_cli.generation.device import NAMES

    wanted = parse_metrics(metrics, METRICS)
    if not size:
        raise UsageError("--size 0: autoencoders are measured on pictures of one size; give one")
    autoencoders = [locate(name, "vae") for name in vae] if vae else [locate(None, "vae")]
    networks = Networks(shared.network_flags(given), inception="rfid" in wanted, lpips="lpips" in wanted)
    found = open_pictures(pictures, shared.framing(size, filter_name), limit)
    # which metrics are measured is in the tables' own settings
    asked = {**found.settings(), **networks.settings(), "measured": sorted(wanted)}
    folder = shared.place(output, "reconstruction", {**asked, **given})
    console.note(f"{len(found)} of {found.found} pictures at {size} pixels; into {folder}")
    dtype = _precision(vae_dtype, device)
    rows, warnings = [], []
    for files, row in zip(autoencoders, _row_names(autoencoders), strict=True):
        console.note(f"autoencoder: {files.describe('--vae')}")
        table = reconstructed(
            found,
            files,
            networks,
            folder / f"{files.name}-{files.short_hash}",
            metrics=wanted,
            batch=batch_size,
            posterior=shared.choice(posterior, "--posterior", POSTERIORS),
            dtype=dtype,
        )
        scores, said = reconstruction_scores(table, wanted)
        rows.append(Row(name=row, scores=tuple(scores)))
        warnings += said
    shared.tell_unusable(found.unusable(), console)
    settings = {
        **found.settings(),
        **networks.settings(),
        "limit": limit,
        "found": found.found,
        "posterior": posterior,
        "vae": [{"name": files.name, "sha256": files.sha256} for files in autoencoders],
        "dtype": NAMES[dtype],
    }
    content, path = write_results(
        folder,
        "eval reconstruction",
        rows,
        settings=settings,
        warnings=warnings,
        paper=TABLE_3,
        unusable=found.unusable(),
    )
    shared.show(console, rows, warnings=warnings, paper=TABLE_3, path=path, content=content)


def _precision(name: str, device: str) -> torch.dtype:
    """``--vae-dtype``. What is published was computed in fp32, so that is ``auto`` on every device: on a GPU, where
    ``sdxl generate`` takes bf16, too.
    """
    from sdxl_cli.generation.device import pick_device, pick_vae_dtype

    chosen = shared.choice(name, "--vae-dtype", ("auto", "fp32", "bf16", "fp16"))
    return pick_vae_dtype("fp32" if chosen == "auto" else chosen, pick_device(device))


def _row_names(autoencoders: Sequence[ModelFiles]) -> list[str]:
    """What each is called in the table: those of one name have their hash beside it."""
    names = [files.name for files in autoencoders]
    return [
        f"{files.name} ({files.short_hash})" if names.count(files.name) > 1 else files.name
        for files in autoencoders
    ]
