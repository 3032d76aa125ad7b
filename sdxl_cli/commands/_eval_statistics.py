"""``sdxl eval statistics``: a reference set measured once, for later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands import _measuring as shared
from sdxl_cli.commands._options import Json, Quiet


def command(
    pictures: Annotated[
        Path,
        typer.Argument(
            help="Folder, table, tar or parquet of pictures.", metavar="PICTURES", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The file: .npz or .safetensors.", metavar="FILE", show_default=False
        ),
    ],
    features: Annotated[
        bool, typer.Option("--features", help="Keep the features too, 8 KB a picture: KID needs them.")
    ] = False,
    size: shared.Size = 0,
    filter_name: shared.Filter = "bicubic",
    limit: shared.Limit = 0,
    batch_size: shared.BatchSize = 16,
    device: shared.Device = "auto",
    inception_weights: shared.InceptionWeights = None,
    resize: shared.Resize = "tf1",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a reference set once: mean and covariance of its features, for --reference."""
    given = dict(locals())
    console = consoles.configure(quiet=quiet, json=as_json)

    from sdxl_cli.evaluation.distribution import measured, require_free, write_statistics
    from sdxl_cli.evaluation.networks import Networks
    from sdxl_cli.evaluation.pictures import open_pictures

    require_free(output)
    networks = Networks(shared.network_flags(given), inception=True)
    found = open_pictures(pictures, shared.framing(size, filter_name), limit)
    settings = {**found.settings(), **networks.settings()}
    # beside the file, so that a run that stopped is found again; it goes when the file is whole
    folder = output.with_name(f"{output.name}.partial")
    table = measured(found, networks, folder, batch=batch_size, description="statistics")
    shared.tell_unusable(found.unusable(), console)
    write_statistics(output, table, settings, features=features)
    table.remove()
    count = len(found) - len(found.problems)
    console.print_result(str(output))
    console.json({"file": output, "pictures": count, "settings": settings, "unusable": found.unusable()})
