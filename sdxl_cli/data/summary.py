"""What a manifest says, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sdxl_cli.data.buckets import Size
from sdxl_cli.data.manifest import Row


@dataclass(frozen=True, slots=True)
class BucketSummary:
    """One bucket and what fills it."""

    size: Size
    """(height, width)"""
    pictures: int
    share: float
    """Of the kept pictures, 0..1."""
    upscaled: int
    """Pictures that are enlarged to fill it."""
    crop_loss: float
    """Mean share of a picture's area that is cut off."""


FILTER_SIDES = (128, 256, 512, 1024)
"""Minimum sizes, in pixels, that data sets are filtered by; the paper's example is 256."""
MAX_TOKENS = 75
"""What a text encoder reads, without start and end."""


@dataclass(frozen=True, slots=True)
class Filter:
    """What a minimum size would have thrown away (paper section 2.2)."""

    side: int
    """In pixels."""
    pictures: int
    """Readable pictures with a shorter side."""
    share: float
    """Of all readable pictures, 0..1."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole manifest. Pictures are counted once, however many crops they have."""

    pictures: int
    kept: int
    crops: int
    refused: dict[str, int]
    """Fate -> pictures, most frequent first."""
    notes: dict[str, int]
    """What opening took -> kept pictures."""
    filters: tuple[Filter, ...]
    upscaled: int
    largest_scale: float
    mean_crop_loss: float
    largest_crop_loss: float
    without_caption: int
    long_captions: int
    """Captions of kept pictures of which the encoders read only a part."""
    buckets: tuple[BucketSummary, ...]


def summarise(rows: Sequence[Row]) -> Summary:
    """Count and average ``rows``; crops of one picture are averaged as crops and counted as one picture."""
    first = [row for row in rows if row.crop == 0]
    kept = [row for row in first if row.kept]
    losses = [row.plan.crop_loss for row in kept]
    return Summary(
        pictures=len(first),
        kept=len(kept),
        crops=sum(row.kept for row in rows),
        refused=dict(Counter(row.fate for row in first if not row.kept).most_common()),
        notes=dict(Counter(note for row in kept for note in row.notes).most_common()),
        filters=tuple(_filters([row.original_size for row in first if row.original_size])),
        upscaled=sum(row.plan.scale > 1 for row in kept),
        largest_scale=max((row.plan.scale for row in kept), default=0.0),
        mean_crop_loss=_mean(losses),
        largest_crop_loss=max(losses, default=0.0),
        without_caption=sum(not row.captions for row in kept),
        long_captions=sum(count > MAX_TOKENS for row in kept for count in row.tokens_clip_l),
        buckets=tuple(_buckets(kept)),
    )


def _filters(sizes: Sequence[Size]) -> list[Filter]:
    counts = [(side, sum(min(size) < side for size in sizes)) for side in FILTER_SIDES]
    return [Filter(side, count, count / len(sizes) if sizes else 0.0) for side, count in counts]


def _buckets(kept: Sequence[Row]) -> list[BucketSummary]:
    groups: dict[Size, list[Row]] = {}
    for row in kept:
        groups.setdefault(row.plan.target_size, []).append(row)
    return [
        BucketSummary(
            size,
            len(rows),
            len(rows) / len(kept),
            sum(row.plan.scale > 1 for row in rows),
            _mean([row.plan.crop_loss for row in rows]),
        )
        for size, rows in sorted(groups.items(), key=lambda item: item[0][0] / item[0][1])
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
