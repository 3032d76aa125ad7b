"""``sdxl download``: models from the Hugging Face hub into its local cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Json, Quiet

PANEL = "Models"


def command(
    name: Annotated[
        str,
        typer.Argument(
            help="base, refiner, vae, or of any repository: org/name/file, or org/name for its model.",
            metavar="NAME",
            show_default=False,
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch, tag or commit.", metavar="NAME", show_default="main"),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option("--variant", help="Take the diffusers folder, in this precision: fp16.", metavar="NAME"),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fetch a model from the Hugging Face hub; the only command that uses the network.

    A download that stopped goes on where it was. The hash is checked before the file takes its place in the cache
    (HF_HOME), where `--model base` and every other program finds it. Prints where it is.
    """
    from sdxl_cli.checkpoint.download import choose, fetch

    console = consoles.configure(quiet=quiet, json=as_json)
    wanted = choose(name, revision, variant)
    paths = [fetch(file) for file in wanted]
    # of a folder, its own place: the index is first
    place: Path = paths[0] if len(paths) == 1 else paths[0].parent
    console.print_result(str(place))
    console.json({"path": place, "files": paths, "repo": wanted[0].repo, "revision": wanted[0].revision})
