"""What becomes of a picture that could be opened: its fate, its bucket and its crops."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from sdxl_cli.data.buckets import BucketTable, Size
from sdxl_cli.data.geometry import plan_crop
from sdxl_cli.data.manifest import MERGED, DatasetConfig, Row


def decide(row: Row, table: BucketTable, config: DatasetConfig, seen: set[str]) -> list[Row]:
    """One row per crop of a picture that is used, else the row with its fate.

    ``seen`` holds the hashes of the pictures before; this one's is added.
    """
    if not row.kept:
        return [row]
    assert row.stored_size
    assert row.sha256
    fate = _fate(row, table, config, seen)
    if fate:
        return [replace(row, fate=fate[0], detail=fate[1])]
    seen.add(row.sha256)
    bucket = choose(row.stored_size, table, config)
    assert bucket
    return [plan_row(row, bucket, config, number) for number in range(config.crops_per_image)]


def choose(size: Size, table: BucketTable, config: DatasetConfig) -> Size | None:
    """The bucket of a picture; None when it may not be enlarged and is smaller than any bucket can be."""
    return table.fitting(size, config.step) if config.no_upscale else table.nearest(size)


def plan_row(row: Row, bucket: Size, config: DatasetConfig, number: int) -> Row:
    """The row with its plan. Its random numbers depend on seed, path and number only, not on other pictures."""
    assert row.stored_size
    rng = random.Random(f"{config.seed}\n{number}\n{row.path}")
    flipped = config.flip and rng.random() < 0.5
    plan = plan_crop(row.stored_size, bucket, config.crop, rng, flipped=flipped)
    return replace(
        row,
        scale=plan.scale,
        resized_size=plan.resized_size,
        crop_top_left=plan.crop_top_left,
        target_size=plan.target_size,
        flipped=plan.flipped,
        crop=number,
    )


def planned_again(row: Row, table: BucketTable, config: DatasetConfig, size: Size) -> Row | None:
    """The row as it would be planned from nothing for a file of that size; None when no bucket takes it."""
    bucket = row.target_size if MERGED in row.notes else choose(size, table, config)
    return plan_row(row, bucket, config, row.crop) if bucket else None


def cover(size: Size, bucket: Size) -> float:
    """How much a picture is scaled to cover a bucket."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def _fate(row: Row, table: BucketTable, config: DatasetConfig, seen: set[str]) -> tuple[str, str] | None:
    assert row.stored_size
    height, width = row.stored_size
    size = f"{width} wide, {height} high"
    if row.sha256 in seen and not config.keep_duplicates:
        return "duplicate", ""
    if config.require_captions and not row.captions:
        return "no_caption", ""
    if min(row.stored_size) < config.min_side:
        return "too_small", size
    limit = config.max_aspect_error
    if limit is not None and table.aspect_error(row.stored_size) > math.log(limit) + 1e-9:
        return "too_narrow", size
    bucket = choose(row.stored_size, table, config)
    if bucket is None:
        return "too_small", f"{size}, no bucket in steps of {config.step}"
    scale = cover(row.stored_size, bucket)
    if config.max_upscale is not None and scale > config.max_upscale:
        return "upscaled_too_far", f"{size}, enlarged {scale:.2f} times"
    return None
