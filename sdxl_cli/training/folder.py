"""A run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.errors import UsageError
from sdxl_cli.presets import to_toml
from sdxl_cli.training.state import STATE_FILE

CONFIG_FILE = "config.resolved.toml"


def prepare(folder: Path, config: Any, *, resume: bool) -> None:
    """Make the folder and write the resolved configuration into it.

    Raises:
        UsageError: there is a run in it already and none is to be resumed, or the other way round.
    """
    there = (folder / STATE_FILE).exists()
    if there and not resume:
        raise UsageError(f"--output {folder} has a run in it; add --resume to go on, or give another folder")
    if resume and not there:
        raise UsageError(f"--output {folder} has no run to resume; leave --resume out to start one")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CONFIG_FILE) as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")
