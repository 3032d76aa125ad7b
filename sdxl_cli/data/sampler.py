"""Which pictures make up which batch: one bucket at a time, all of them once an epoch, from any step on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdxl_cli.data.buckets import Size
from sdxl_cli.data.manifest import Remainder, Row
from sdxl_cli.errors import UsageError


@dataclass(frozen=True, slots=True)
class SamplerState:
    """The next batch to come: enough to go on from."""

    epoch: int = 0
    index: int = 0
    """Of the batch within the epoch."""


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Rows that go together on one device."""

    bucket: Size
    """(height, width) of every picture in it."""
    indices: tuple[int, ...]
    """Into the sampler's rows."""
    epoch: int
    places: tuple[int, ...]
    """Of each among the pictures of the whole step."""
    weights: tuple[float, ...]
    """What each picture's loss is multiplied with before the batch is averaged; see :class:`BucketSampler`."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What all devices share in a step."""

    bucket: Size
    indices: list[int]
    weights: list[float]


class BucketSampler:
    """Batches of one bucket each, the buckets interleaved in proportion to what they hold.

    An epoch shows every picture once (or ``row.repeats`` times), with one of its crops: the first in one epoch, the
    next in another. An epoch's steps are a function of (seed, epoch, batch size x world size, remainder) alone, so any
    step can be had without those before it.

    With several devices a step is ``batch_size * world_size`` pictures of one bucket, dealt out to the ranks: no two
    ranks get the same picture of it, and all ranks have the same number of steps and the same shape in each.

    The pictures of a bucket rarely fill whole steps. Whatever ``remainder`` does about the last one, every picture
    counts alike: the mean over ranks of ``mean(weight * loss)`` adds ``1 / (batch_size * world_size)`` of each
    picture's loss per epoch and repeat. In a whole batch all weights are 1. A rank for which a short step has no
    picture gets one of it with weight 0.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        together: int | None = None,
        parts: int = 1,
        remainder: Remainder = "short",
    ) -> None:
        """Args:
            rows: kept rows of one manifest; several crops of one picture are known by their path.
            batch_size: pictures per step and device.
            seed: decides the order.
            rank: of this device, from 0.
            world_size: number of devices.
            together: pictures per step over all devices, when it is not ``batch_size * world_size``: another number of
                devices can so go on with the steps of a run.
            parts: batches that a device's pictures of a step are handed out in, one after the other.
            remainder: see :data:`~sdxl_cli.data.manifest.Remainder`; ``merge`` is done when a manifest is made, what
                is still left over is then a short batch.

        Raises:
            UsageError: nothing fills a batch with ``drop``.
        """
        assert rows, "nothing to sample from"
        assert batch_size >= 1
        assert 0 <= rank < world_size
        assert all(row.kept for row in rows)
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size, self.remainder = rank, world_size, remainder
        self.parts = parts
        self.together = together or batch_size * world_size
        """Pictures in a step over all devices."""
        self.state = SamplerState()
        """Set it to go on from elsewhere."""
        pictures: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            pictures.setdefault(row.path, []).append(index)
        self._buckets: dict[Size, list[tuple[list[int], int]]] = {}
        for crops in pictures.values():
            first = rows[crops[0]]
            shown = ((crops, number) for number in range(first.repeats))
            self._buckets.setdefault(first.plan.target_size, []).extend(shown)
        self.pictures = sum(len(group) for group in self._buckets.values())
        """Pictures an epoch is to show, repeats counted."""
        steps = sum(self._steps(len(group)) for group in self._buckets.values())
        self.batches_per_epoch = steps * parts
        """Of one device; the same in every epoch and on every rank."""
        if not self.batches_per_epoch:
            raise UsageError(
                f"remainder = drop leaves nothing: no bucket has {self.together} pictures; "
                "use a smaller batch or another remainder"
            )
        self._planned: tuple[int, list[PlannedBatch]] | None = None

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """All batches of an epoch for this rank, in order."""
        if self._planned is None or self._planned[0] != epoch:
            parts = range(self.parts)
            self._planned = (epoch, [self._mine(step, epoch, n) for step in self._plan(epoch) for n in parts])
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

    def _steps(self, count: int) -> int:
        return count // self.together if self.remainder == "drop" else -(-count // self.together)

    def _plan(self, epoch: int) -> list[_Step]:
        rng = random.Random(f"{self.seed}\n{epoch}")
        placed: list[tuple[float, _Step]] = []
        for bucket, pictures in sorted(self._buckets.items()):
            order = list(pictures)
            rng.shuffle(order)
            chosen = [crops[(epoch * self.rows[crops[0]].repeats + n) % len(crops)] for crops, n in order]
            steps = self._filled(bucket, chosen, epoch)
            rng.shuffle(steps)  # so that the short one is not always last
            for number, step in enumerate(steps):
                # spread evenly over the epoch, each in its own stretch of it
                position = (number + rng.random()) / len(steps)
                placed.append((position, step))
        return [step for _, step in sorted(placed, key=lambda item: item[0])]

    def _filled(self, bucket: Size, chosen: list[int], epoch: int) -> list[_Step]:
        """The bucket's pictures in steps, the last one as ``remainder`` says."""
        count, whole = len(chosen), self.together
        places = list(chosen)
        if self.remainder == "drop":
            places = places[: count // whole * whole]
        elif self.remainder == "pad":
            rng = random.Random(f"{self.seed}\n{epoch}\npad\n{bucket}")
            while missing := -len(places) % whole:
                # first those that are not in the last step already
                candidates = chosen[: count // whole * whole] or chosen
                places += rng.sample(candidates, min(missing, len(candidates)))
        if self.remainder == "drop":
            weights = [count / max(1, len(places))] * len(places)
        else:
            times, wanted = Counter(places), Counter(chosen)
            weights = [wanted[index] / times[index] for index in places]
        return [
            _Step(bucket, places[i : i + whole], weights[i : i + whole]) for i in range(0, len(places), whole)
        ]

    def _mine(self, step: _Step, epoch: int, part: int) -> PlannedBatch:
        """One of the batches that this rank's pictures of a step are handed out in."""
        hands = self.world_size * self.parts
        mine = slice(part * self.world_size + self.rank, None, hands)
        indices, weights = step.indices[mine], step.weights[mine]
        if not indices:
            return PlannedBatch(step.bucket, (step.indices[0],), epoch, (0,), (0.0,))
        share = len(indices) * hands / self.together
        places = tuple(range(len(step.indices))[mine])
        return PlannedBatch(
            step.bucket, tuple(indices), epoch, places, tuple(share * weight for weight in weights)
        )


def choose_caption(row: Row, seed: int, epoch: int) -> str:
    """One of the row's captions, by (seed, epoch, path); the empty text when it has none."""
    if not row.captions:
        return ""
    return row.captions[random.Random(f"{seed}\n{epoch}\n{row.path}").randrange(len(row.captions))]
