"""Numbers of a run: means that know how much they stand for, and the lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.training.world import ALONE, World

IMAGES = "images"
"""The metric that is summed over the batches of a step; all others are averaged."""


class Sink(Protocol):
    """Somewhere else where lines go."""

    def write(self, line: Mapping[str, float]) -> None:
        """A line of metrics.jsonl: ``step``, and numbers."""
        ...

    def close(self) -> None:
        """No more lines come."""
        ...


class Mean(float):
    """A mean over ``count`` things; means are merged in proportion to it. A plain float counts once."""

    count: float

    def __new__(cls, value: float, count: float) -> Mean:
        """``value`` is the mean, ``count`` at least one."""
        mean = super().__new__(cls, value)
        mean.count = count
        return mean


def merged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    means: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        counts = [value.count if isinstance(value, Mean) else 1.0 for value in values]
        total = sum(counts)
        means[key] = Mean(sum(v * c for v, c in zip(values, counts, strict=True)) / total, total)
    return means


def summed_images(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its batches."""
    means = merged(rows)
    if IMAGES in means:
        means[IMAGES] = sum(row.get(IMAGES, 0.0) for row in rows)
    return means


def statistics(tensor: Tensor) -> dict[str, float | int]:
    """Range, mean and deviation of what is finite in a tensor, and how much is not."""
    finite = tensor[tensor.isfinite()].double()
    found: dict[str, float | int] = {"values": tensor.numel(), "not finite": tensor.numel() - len(finite)}
    if len(finite):
        numbers = {"min": finite.min(), "max": finite.max(), "mean": finite.mean()}
        found |= {name: float(value) for name, value in numbers.items()}
        found["std"] = float(finite.std(correction=0))
    return found


def packed(row: Mapping[str, float]) -> dict[str, list[float]]:
    """A row as JSON values: each mean with its count."""
    return {key: [float(v), v.count if isinstance(v, Mean) else 1.0] for key, v in row.items()}


def unpacked(row: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The inverse of :func:`packed`."""
    return {key: Mean(value, count) for key, (value, count) in row.items()}


class Log:
    """metrics.jsonl: a line of means every few steps. The leading process writes it, with everybody's numbers."""

    def __init__(self, path: Path, every: int, last: int, world: World = ALONE) -> None:
        """Args:
        path: lines are added to it.
        every: steps between lines.
        last: the run's number of steps; the last one has a line in any case.
        world: the processes, each of which has the numbers of its own pictures.
        """
        self.path, self.every, self.last, self.world = path, every, last, world
        self.rows: list[Mapping[str, float]] = []
        self.since = time.perf_counter()
        self.sinks: list[Sink] = []
        """Who gets every line besides the file."""
        self._before = self.since
        self._rate = 0.0

    def __enter__(self) -> Log:
        self._before = self.since = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        for sink in self.sinks:
            sink.close()

    def rewind(self, step: int, rows: Sequence[Mapping[str, Sequence[float]]]) -> None:
        """Forget the lines after ``step``, which the run will write again, and what onlookers said of it.

        Args:
            step: that the run goes on from.
            rows: the :meth:`pending` of then.
        """
        self.rows = [unpacked(row) for row in rows] if self.world.leads else []
        self.world.by_lead(lambda: self._keep(step))

    def pending(self) -> list[dict[str, list[float]]]:
        """The rows that are in no line yet, those of all processes in one, in the leading process."""
        return [packed(row) for row in self._together()]

    def add(self, index: int, metrics: Mapping[str, float]) -> None:
        """The metrics of step ``index``, counted from 0."""
        self.rows.append(metrics)
        now = time.perf_counter()
        rate = metrics.get(IMAGES, 0.0) * self.world.size / max(now - self._before, 1e-9)
        self._rate, self._before = 0.9 * self._rate + 0.1 * rate if self._rate else rate, now
        if (index + 1) % self.every and index + 1 != self.last:
            return
        rows = self._together()
        seconds = time.perf_counter() - self.since
        images = sum(row.get(IMAGES, 0.0) for row in rows)
        self.write({"step": index + 1, "images_per_second": images / seconds, **merged(rows)})
        self.rows, self.since = [], time.perf_counter()

    def status(self, loss: float, task: object) -> str:
        """The end of the progress bar: the loss, pictures per second of all processes, and the size of the last ones.

        Args:
            loss: of the run.
            task: has ``size``, (height, width), where its pictures have several.
        """
        said = [f"loss {loss:.4f}", f"{self._rate:.3g} img/s"]
        if size := getattr(task, "size", None):
            said.append("{1}x{0}".format(*size))
        return ", ".join(said)

    def write(self, line: Mapping[str, float]) -> None:
        """Add a line of its own; in the leading process only."""
        if not self.world.leads:
            return
        rounded = {key: value if isinstance(value, int) else _short(value) for key, value in line.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")
        for sink in self.sinks:
            sink.write(rounded)

    def _together(self) -> list[dict[str, float]]:
        """Every step's row over all processes; what was resumed with is the leading one's alone, and oldest."""
        every = self.world.gathered([packed(row) for row in self.rows])
        count = max(len(rows) for rows in every)
        steps = [[rows[n - count] for rows in every if len(rows) >= count - n] for n in range(count)]
        return [summed_images([unpacked(row) for row in rows]) for rows in steps]

    def _keep(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                said = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            seen_again = said["step"] == step and "loss" not in said
            if said["step"] <= step and not seen_again:
                kept.append(line + "\n")
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _short(value: float) -> float:
    return float(f"{value:.6g}")
