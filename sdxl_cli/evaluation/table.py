"""Rows of numbers on disk, one a picture, that survive being killed while they are made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.checkpoint.write import save_tensors
from sdxl_cli.console import get as console
from sdxl_cli.console import to_jsonable
from sdxl_cli.errors import FileError, Interrupted

SETTINGS = "settings.json"
USED = "used"
"""A column of zeros and ones: whether the row's picture could be measured."""
SAVE_SECONDS, SAVE_ROWS = 60.0, 1024
"""A file is written when this much has come together: what a kill may cost."""

Columns = dict[str, Tensor]
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]


class Table:
    """A folder with ``settings.json`` and files of consecutive rows. Rows are made in order, in whole batches.

    Batches begin at the same rows whether or not a run was stopped, so the numbers are the same to the last bit.
    """

    def __init__(self, folder: Path, count: int, settings: Mapping[str, Any]) -> None:
        """Open the table, or begin it.

        Args:
            folder: its place.
            count: rows it is to have.
            settings: all that decides about the numbers; JSON.

        Raises:
            FileError: the folder has a table that was made otherwise.
        """
        self.folder, self.count = folder, count
        _agree(folder / SETTINGS, to_jsonable({**settings, "rows": count}))
        self._files: dict[int, TensorFile] = {}
        self._look()

    @property
    def done(self) -> int:
        """Rows that are there."""
        return sum(len(file_rows(file)) for file in self._files.values())

    def fill(
        self,
        compute: Callable[[range], Columns],
        *,
        batch: int,
        description: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the rows that are missing.

        Args:
            compute: rows to columns, each of whose tensors has one entry a row; ``used`` among them.
            batch: rows that are computed together.
            description: for the progress bar.
            clock: seconds.

        Raises:
            Interrupted: the user stopped it; what was done is saved.
        """
        start = self.done
        starts = range(start, self.count, batch)
        if start:
            console().note(f"{description}: {start} of {self.count} are there already")
        waiting: list[Columns] = []
        first, saved = start, clock()
        try:
            with console().bar(description, total=self.count) as bar:
                bar.advance(start)
                for begin in starts:
                    rows = range(begin, min(begin + batch, self.count))
                    waiting.append(compute(rows))
                    bar.advance(len(rows))
                    if clock() - saved >= SAVE_SECONDS or rows.stop - first >= SAVE_ROWS:
                        first, saved = self._save(waiting, first), clock()
        except KeyboardInterrupt as error:
            first = self._save(waiting, first)
            raise Interrupted(
                f"stopped at {first} of {self.count}; the same command goes on from there ({self.folder})"
            ) from error
        finally:
            self._save(waiting, first)

    def column(self, name: str) -> Tensor:
        """All usable rows of a column, in memory."""
        return torch.cat(list(self.parts(name)))

    def parts(self, name: str) -> Iterator[Tensor]:
        """The usable rows of a column, file by file."""
        for start in sorted(self._files):
            file = self._files[start]
            yield file.read(name)[file.read(USED).bool()]

    def rows(self, name: str) -> Column:
        """The usable rows of a column by number, read when asked for."""
        return Column([self._files[start] for start in sorted(self._files)], name)

    def unusable(self) -> list[int]:
        """Numbers of the rows without numbers."""
        used = torch.cat([self._files[start].read(USED) for start in sorted(self._files)])
        return (used == 0).nonzero().flatten().tolist()

    def remove(self) -> None:
        """Take the table off the disk: what was to be learned from it is elsewhere."""
        for path in [*self.folder.glob("rows-*.safetensors"), self.folder / SETTINGS]:
            path.unlink()
        self.folder.rmdir()

    def _save(self, waiting: list[Columns], first: int) -> int:
        """Write what waits as a file; returns where the next begins."""
        if not waiting:
            return first
        columns = {name: torch.cat([part[name] for part in waiting]).contiguous() for name in waiting[0]}
        stop = first + len(columns[USED])
        save_tensors(self.folder / f"rows-{first:08d}-{stop:08d}.safetensors", columns)
        waiting.clear()
        self._look()
        return stop

    def _look(self) -> None:
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            start, stop = (int(part) for part in path.stem.split("-")[1:])
            if start not in self._files:
                self._files[start] = TensorFile(path)
                if len(file_rows(self._files[start])) != stop - start:
                    raise FileError(f"{path}: has not the rows its name says; remove it and run again")
        expected = 0
        for start in sorted(self._files):
            if start != expected:
                raise FileError(
                    f"{self.folder}: rows {expected} to {start} are missing; remove the files after them"
                )
            expected += len(file_rows(self._files[start]))


class Column:
    """One column of a table, row by row; see :class:`sdxl_cli.metrics.distances.Rows`."""

    def __init__(self, files: Sequence[TensorFile], name: str) -> None:
        """``files`` in the order of their rows."""
        self._files, self._name = files, name
        used = [np.flatnonzero(file.read(USED).numpy()) for file in files]
        self._places = np.concatenate(used) if used else np.zeros(0, np.int64)
        self._homes = np.repeat(np.arange(len(files)), [len(part) for part in used])

    def __len__(self) -> int:
        return len(self._places)

    def take(self, indices: Indices) -> Tensor:
        """These rows."""
        places, homes = self._places[indices], self._homes[indices]
        parts, order = [], []
        for home in np.unique(homes):
            mine = np.flatnonzero(homes == home)
            parts.append(self._files[home].read(self._name)[torch.from_numpy(places[mine])])
            order.append(mine)
        found = torch.cat(parts)
        return found[torch.from_numpy(np.argsort(np.concatenate(order)))]


def file_rows(file: TensorFile) -> range:
    """The rows of a file, from 0."""
    return range(file.shapes[USED][0])


def _agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, or see that they are those the folder was begun with."""
    if not path.exists():
        with atomic_write(path, overwrite=False) as temporary:
            temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path} is damaged; remove the folder, or give another --output") from error
    if other := [name for name in {**before, **settings} if before.get(name) != settings.get(name)]:
        name = other[0]
        raise FileError(
            f"{path.parent} was begun with other settings ({name}: {_short(before.get(name))}, now "
            f"{_short(settings.get(name))}); give another --output"
        )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
