"""Which pictures make up which batch: one bucket at a time, all of them once an epoch, from any step on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdxl_cli.data.buckets import Size
from sdxl_cli.data.manifest import Row


@dataclass(frozen=True, slots=True)
class SamplerState:
    """The next batch to come: enough to go on from."""

    epoch: int = 0
    index: int = 0
    """Of the batch within the epoch."""


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Rows that go together."""

    bucket: Size
    """(height, width) of every picture in it."""
    indices: tuple[int, ...]
    """Into the sampler's rows."""
    epoch: int


class BucketSampler:
    """Batches of one bucket each, the buckets interleaved in proportion to what they hold.

    An epoch shows every picture once, with one of its crops: the first in one epoch, the next in another. The last
    batch of a bucket may be short, so its pictures weigh a little more; nothing is repeated or left out. An epoch's
    batches are a function of (seed, epoch) alone, so any step can be had without those before it.
    """

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int = 0) -> None:
        """``rows`` are kept rows of one manifest; several crops of one picture are known by their path."""
        assert rows, "nothing to sample from"
        assert batch_size >= 1
        assert all(row.kept for row in rows)
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.state = SamplerState()
        """Set it to go on from elsewhere."""
        pictures: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            pictures.setdefault(row.path, []).append(index)
        self._buckets: dict[Size, list[list[int]]] = {}
        for crops in pictures.values():
            self._buckets.setdefault(rows[crops[0]].plan.target_size, []).append(crops)
        self.pictures = len(pictures)
        """Pictures an epoch shows."""
        self.batches_per_epoch = sum(-(-len(group) // batch_size) for group in self._buckets.values())
        """Steps in an epoch; the same in every epoch."""
        self._planned: tuple[int, list[PlannedBatch]] | None = None

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """All batches of an epoch, in order."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1]

    def at(self, step: int) -> PlannedBatch:
        """Batch number ``step`` counted from the start of the run."""
        epoch, index = divmod(step, self.batches_per_epoch)
        return self.epoch(epoch)[index]

    def __iter__(self) -> Iterator[PlannedBatch]:
        """Batches without end, from ``state`` on; ``state`` is moved before each one is handed out."""
        while True:
            batch = self.epoch(self.state.epoch)[self.state.index]
            last = self.state.index + 1 == self.batches_per_epoch
            self.state = (
                SamplerState(self.state.epoch + 1, 0)
                if last
                else SamplerState(self.state.epoch, self.state.index + 1)
            )
            yield batch

    def _plan(self, epoch: int) -> list[PlannedBatch]:
        rng = random.Random(f"{self.seed}\n{epoch}")
        placed: list[tuple[float, PlannedBatch]] = []
        for bucket, pictures in sorted(self._buckets.items()):
            order = list(pictures)
            rng.shuffle(order)
            chosen = [crops[epoch % len(crops)] for crops in order]
            batches = [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
            rng.shuffle(batches)  # so that the short one is not always last
            for number, indices in enumerate(batches):
                # spread evenly over the epoch, each in its own stretch of it
                position = (number + rng.random()) / len(batches)
                placed.append((position, PlannedBatch(bucket, tuple(indices), epoch)))
        return [batch for _, batch in sorted(placed, key=lambda item: item[0])]


def choose_caption(row: Row, seed: int, epoch: int) -> str:
    """One of the row's captions, by (seed, epoch, path); the empty text when it has none."""
    if not row.captions:
        return ""
    return row.captions[random.Random(f"{seed}\n{epoch}\n{row.path}").randrange(len(row.captions))]
