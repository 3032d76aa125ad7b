"""A run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.errors import UsageError
from sdxl_cli.presets import to_toml
from sdxl_cli.training.state import State, find_state, states
from sdxl_cli.training.world import ALONE, World, restarted

CONFIG_FILE = "config.resolved.toml"


def prepare(folder: Path, config: Any, *, resume: bool, world: World = ALONE) -> State | None:
    """Make the folder, write the resolved configuration into it, and find what the run goes on from.

    Raises:
        UsageError: there is a run in it already and none is to be resumed, or the other way round.
        FileError: see :func:`~sdxl_cli.training.state.find_state`.
    """
    there = world.by_lead(lambda: _prepare(folder, config, resume))
    return find_state(folder, world) if there else None


def _prepare(folder: Path, config: Any, resume: bool) -> bool:
    there, again = bool(states(folder)), restarted()
    if there and not resume and not again:
        raise UsageError(f"--output {folder} has a run in it; add --resume to go on, or give another folder")
    if resume and not there and not again:
        raise UsageError(f"--output {folder} has no run to resume; leave --resume out to start one")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CONFIG_FILE) as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")
    return there
