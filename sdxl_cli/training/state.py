"""Training states on disk: everything needed to go on, whole or not at all, the last good one kept."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from sdxl_cli.checkpoint.atomic import sync
from sdxl_cli.checkpoint.stream import require_room
from sdxl_cli.checkpoint.tensor_file import DTYPES
from sdxl_cli.console import get as console
from sdxl_cli.errors import FileError, SdxlError
from sdxl_cli.training.storage import StateReader, StateWriter, check_file, read_index
from sdxl_cli.training.world import ALONE, World

STATES = "state"
"""In a run's folder: ``step-00000500`` and the like, each with ``state.json`` and files of tensors."""
INDEX_ROOM = 1 << 20
"""Bytes counted for the index and headers."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class State:
    """A whole state that was found."""

    path: Path
    values: dict[str, Any]
    """JSON values that were saved with the tensors."""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]


def states(folder: Path) -> list[Path]:
    """The states of a run, the newest first; whether they are good is not looked at."""
    found = (folder / STATES).iterdir() if (folder / STATES).is_dir() else iter(())
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def save_state(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    keep: int = 2,
    world: World = ALONE,
) -> Path:
    """Add a state, then remove those of later steps and all but the ``keep`` newest up to it. All processes of a run
    call it together.

    The folder gets its name when everything in it is on the disk: a kill at any moment leaves the states before it.

    Args:
        folder: of the run.
        step: names the state.
        tensors: weights, averages and optimizer moments, by name; this process's shards where they are sharded.
        values: JSON values; the leading process's are kept.
        keep: states, at least one, this one among them.
        world: the processes.

    Raises:
        SdxlError: the disk is full; nothing was changed.
        FileError: the folder cannot be written.
    """
    path = folder / STATES / f"step-{step:08d}"
    unfinished = path.with_name(f".{path.name}.partial")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + INDEX_ROOM
    world.by_lead(lambda: _begin(path, unfinished, size))
    try:
        with _told_already():
            save_shards(
                dict(tensors), storage_writer=StateWriter(unfinished, values), no_dist=not world.joined
            )
    except CheckpointException as error:
        failures = [failure[0] for failure in error.failures.values()]
        if known := next((failure for failure in failures if isinstance(failure, SdxlError)), None):
            world.fail(known)
        raise failures[0] from error
    world.by_lead(lambda: _finish(path, unfinished, keep))
    return path


def find_state(folder: Path, world: World = ALONE) -> State:
    """The newest state that is whole, read from end to end to be sure; damaged newer ones are named in a line each.

    Raises:
        FileError: there is none.
    """
    damage: list[str] = []
    for path in states(folder):
        said = _damage(path, world)
        if said is None:
            for line in damage:
                console().warn(f"{line}; going on from {path.name}, the state before")
            return _opened(path)
        damage.append(said)
    what = f"{folder} has no training state; give --output a folder that a training run wrote"
    if damage:
        what = f"{damage[0]}; no state before it is whole: start a new run in another --output folder"
    return world.fail(FileError(what))


def _opened(path: Path) -> State:
    index = read_index(path)
    tensors = index["tensors"]
    return State(
        path,
        index["values"],
        {name: tuple(entry["shape"]) for name, entry in tensors.items()},
        {name: DTYPES[entry["dtype"]] for name, entry in tensors.items()},
    )


def read_state(state: State, tensors: Mapping[str, Tensor], world: World = ALONE) -> None:
    """Fill tensors, or this process's shards of them, with those of the same names.

    Args:
        state: has all of them, at their shapes.
        tensors: changed in place.
        world: the processes.
    """
    with torch.no_grad(), _told_already():
        load_shards(dict(tensors), storage_reader=StateReader(state.path), no_dist=not world.joined)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a run's last state in whole, and its values.

    Raises:
        FileError: there is no state there, or it is damaged.
    """
    state = find_state(folder)
    tensors = {name: torch.empty(shape, dtype=state.dtypes[name]) for name, shape in state.shapes.items()}
    read_state(state, tensors)
    return tensors, state.values


@contextmanager
def _told_already() -> Iterator[None]:
    """torch warns that one process saves alone, which is what it was told to do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _begin(path: Path, unfinished: Path, size: int) -> None:
    require_room(path, size)
    for left in path.parent.glob(".step-*") if path.parent.is_dir() else ():
        shutil.rmtree(left, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise FileError(f"{unfinished} cannot be made: {error.strerror}") from error


def _finish(path: Path, unfinished: Path, keep: int) -> None:
    """Everything is written: give it its name, and only then let older ones go."""
    try:
        sync(unfinished)
        if path.exists():  # a damaged one of the same step
            path.rename(path.with_name(f".{path.name}.old"))
        unfinished.rename(path)
        sync(path.parent)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error
    for gone in [*_not_kept(path, keep), *path.parent.glob(".step-*")]:
        shutil.rmtree(gone, ignore_errors=True)


def _not_kept(path: Path, keep: int) -> list[Path]:
    """The states of later steps, which are damaged or the run went on from before them; and those that are too old."""
    found, step = states(path.parent.parent), _step(path)
    later = [one for one in found if _step(one) > step]
    return later + [one for one in found if _step(one) <= step][keep:]


def _damage(path: Path, world: World) -> str | None:
    """What is wrong with a state; every process reads a part of it."""
    try:
        files = dict(read_index(path)["files"])
        for name in list(files)[world.rank :: world.size]:
            check_file(path / name, **files[name])
        said = None
    except FileError as error:
        said = str(error)
    return next((line for line in world.gathered(said) if line), None)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])
