"""Flags that many subcommands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress bars on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")]
Preset = Annotated[
    str | None,
    typer.Option("--preset", help="Name of a shipped preset, or a path to a TOML file.", metavar="NAME"),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file laid over the preset.", metavar="FILE", dir_okay=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key of the configuration; may be repeated.", metavar="KEY=VALUE"),
]
