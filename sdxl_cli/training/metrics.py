"""Numbers of a run: means that know how much they stand for, and the lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

IMAGES = "images"
"""The metric that is summed over the batches of a step; all others are averaged."""


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


class Log:
    """metrics.jsonl: a line of means every few steps."""

    def __init__(self, path: Path, every: int, last: int) -> None:
        """Args:
        path: lines are added to it.
        every: steps between lines.
        last: the run's number of steps; the last one has a line in any case.
        """
        self.path, self.every, self.last = path, every, last
        self.rows: list[Mapping[str, float]] = []
        self.since = time.perf_counter()

    def add(self, index: int, metrics: Mapping[str, float]) -> None:
        """The metrics of step ``index``, counted from 0."""
        self.rows.append(metrics)
        if (index + 1) % self.every and index + 1 != self.last:
            return
        seconds = time.perf_counter() - self.since
        images = sum(row.get(IMAGES, 0.0) for row in self.rows)
        self.write({"step": index + 1, "images_per_second": images / seconds, **merged(self.rows)})
        self.rows, self.since = [], time.perf_counter()

    def write(self, line: Mapping[str, float]) -> None:
        """Add a line of its own."""
        rounded = {key: value if isinstance(value, int) else _short(value) for key, value in line.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")


def _short(value: float) -> float:
    return float(f"{value:.6g}")
