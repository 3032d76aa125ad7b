"""Pictures that fill no whole batch: moved to the neighbouring bucket, or counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdxl_cli.data.buckets import Size
from sdxl_cli.data.manifest import MERGED, DatasetConfig, Remainder, Row
from sdxl_cli.data.planning import cover, plan_row


@dataclass(frozen=True, slots=True)
class BucketRepeats:
    """What an epoch makes of the pictures of one bucket."""

    bucket: Size
    pictures: int
    """Times a picture is asked for: pictures times their repeats."""
    batches: int
    """Steps of an epoch."""
    over: int
    """Pictures in the last, not whole, batch."""
    filled: int
    """Places filled with a second showing (pad)."""
    dropped: int
    """Pictures that an epoch leaves out (drop)."""
    unequalised: float
    """Weight of a picture, averaged over the bucket, if losses were averaged over every batch as it is."""
    effective: float
    """Weight of a picture with the weights of :class:`~sdxl_cli.data.sampler.BucketSampler`: 1, or 0 if never shown."""


def merge_remainders(rows: Sequence[Row], config: DatasetConfig) -> list[Row]:
    """Move what fills no batch to the neighbouring bucket, from the most elongated ones inwards.

    Of a bucket's pictures those nearest in shape to the neighbour go. A picture that the neighbour would enlarge more
    than ``max_upscale`` (or at all, with ``no_upscale``) stays. Crops are planned anew, so all that is recorded stays
    true; what moved is noted. In the end at most the last buckets are not whole.

    Args:
        rows: of a manifest, in its order.
        config: ``batch_size`` says how many fill a batch.
    """
    assert config.batch_size
    groups: dict[Size, list[Row]] = {}
    for row in rows:
        if row.kept and row.crop == 0:
            groups.setdefault(row.plan.target_size, []).append(row)
    order = sorted(groups, key=_log)
    if not order:
        return list(rows)
    centre = max(order, key=lambda size: (len(groups[size]), -abs(_log(size))))
    middle = order.index(centre)
    chain = [(a, b) for a, b in zip(order[:middle], order[1 : middle + 1], strict=True)]
    chain += [(a, b) for a, b in zip(order[:middle:-1], order[-2::-1], strict=False)]
    limit = 1.0 if config.no_upscale else config.max_upscale or math.inf
    moved: dict[str, Size] = {}
    for bucket, neighbour in chain:
        group = groups[bucket]
        over = sum(row.repeats for row in group) % config.batch_size
        fitting = [row for row in group if cover(_stored(row), neighbour) <= limit + 1e-9]
        for row in sorted(fitting, key=lambda row: abs(_log(_stored(row)) - _log(neighbour))):
            if row.repeats > over:
                continue
            over -= row.repeats
            group.remove(row)
            groups[neighbour].append(row)
            moved[row.path] = neighbour
    return [_moved(row, moved[row.path], config) if row.kept and row.path in moved else row for row in rows]


def _moved(row: Row, bucket: Size, config: DatasetConfig) -> Row:
    return replace(plan_row(row, bucket, config, row.crop), notes=(*row.notes, MERGED))


def effective_repeats(rows: Sequence[Row], batch_size: int, remainder: Remainder) -> list[BucketRepeats]:
    """What an epoch makes of every bucket.

    Args:
        rows: of a manifest.
        batch_size: over all devices.
        remainder: the policy; merged pictures have moved already, so what is left over is then ``short``.
    """
    counts: dict[Size, int] = {}
    for row in rows:
        if row.kept and row.crop == 0:
            counts[row.plan.target_size] = counts.get(row.plan.target_size, 0) + row.repeats
    return [_repeats(size, counts[size], batch_size, remainder) for size in sorted(counts, key=_log)]


def _repeats(bucket: Size, count: int, batch_size: int, remainder: Remainder) -> BucketRepeats:
    whole, over = divmod(count, batch_size)
    batches = whole if remainder == "drop" else whole + bool(over)
    dropped = over if remainder == "drop" else 0
    return BucketRepeats(
        bucket=bucket,
        pictures=count,
        batches=batches,
        over=over,
        filled=batches * batch_size - count if remainder == "pad" else 0,
        dropped=dropped,
        # every step weighs the same, whatever is in it
        unequalised=batches * batch_size / count,
        effective=1.0 if batches else 0.0,
    )


def _stored(row: Row) -> Size:
    assert row.stored_size
    return row.stored_size


def _log(size: Size) -> float:
    return math.log(size[0] / size[1])
