"""From pictures to manifest rows: open each one, choose its bucket, plan its crops."""

from __future__ import annotations

import hashlib
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdxl_cli.data.buckets import BucketTable, Size
from sdxl_cli.data.geometry import apply_crop, plan_crop
from sdxl_cli.data.hygiene import Refused, open_picture, read_bytes
from sdxl_cli.data.manifest import DatasetConfig, Manifest, Row
from sdxl_cli.data.sources import Item


def scan(
    root: Path, items: Sequence[Item], config: DatasetConfig, *, workers: int = 1
) -> Iterator[list[Row]]:
    """The rows of every item, in the items' order whatever the number of ``workers`` (threads).

    Every picture is decoded completely, so that a truncated one is found now and not in the night.
    """
    table = config.buckets.table()
    seen: set[str] = set()
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides, and says so
        for row in pool.map(lambda item: _look(root, item, config), items):
            yield decide(row, table, config, seen)


def _look(root: Path, item: Item, config: DatasetConfig) -> Row:
    """What the file is, as far as it can be told."""
    row = Row(path=item.path, captions=item.captions, aesthetic_score=item.aesthetic_score)
    if item.problem:
        return replace(row, fate=item.problem)
    try:
        path = root / item.path
        data = read_bytes(path)
        row = replace(row, sha256=hashlib.sha256(data).hexdigest())
        opened = open_picture(data, config.hygiene, suffix=path.suffix)
    except Refused as refusal:
        return replace(row, fate=refusal.reason, detail=str(refusal).partition(": ")[2])
    return replace(
        row,
        original_size=item.original_size or opened.size,
        stored_size=opened.size,
        orientation=opened.orientation,
        notes=opened.notes,
    )


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
    return [
        _crop(row, table.nearest(row.stored_size), config, number) for number in range(config.crops_per_image)
    ]


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
    error = table.aspect_error(row.stored_size)
    if config.max_aspect_error is not None and error > math.log(config.max_aspect_error) + 1e-9:
        return "too_narrow", size
    scale = _cover(row.stored_size, table.nearest(row.stored_size))
    if config.max_upscale is not None and scale > config.max_upscale:
        return "upscaled_too_far", f"{size}, enlarged {scale:.2f} times"
    return None


def _cover(size: Size, bucket: Size) -> float:
    return max(bucket[0] / size[0], bucket[1] / size[1])


def _crop(row: Row, bucket: Size, config: DatasetConfig, number: int) -> Row:
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


def read_pixels(root: Path, row: Row, config: DatasetConfig) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The training pixels of a kept row, ``uint8 [height, width, 3]`` of its bucket.

    Raises:
        Refused: the file is gone, or is not the one the row was made from.
    """
    data = read_bytes(root / row.path)
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise Refused("changed")
    opened = open_picture(data, config.hygiene)
    return np.array(apply_crop(opened.image, row.plan))


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A row that does not say the truth about its picture."""

    path: str
    what: str


def verify(manifest: Manifest, count: int, *, seed: int = 0) -> tuple[int, list[Mismatch]]:
    """Prove for ``count`` kept rows, drawn by ``seed``, that what is recorded regenerates the training pixels.

    Each file is hashed, its row planned again from nothing, and the pixels the loader would give compared
    bit for bit with those got on another way: resize whole, mirror and cut as an array by the recorded numbers.

    Returns:
        How many rows were looked at, and what is wrong.
    """
    rows = list(manifest.kept)
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))
    wrong = [Mismatch(row.path, what) for row in chosen if (what := _disagreement(manifest, row))]
    return len(chosen), wrong


def _disagreement(manifest: Manifest, row: Row) -> str | None:
    config = manifest.config
    try:
        pixels = read_pixels(manifest.root, row, config)
        opened = open_picture(read_bytes(manifest.root / row.path), config.hygiene)
    except Refused as refusal:
        return str(refusal)
    if opened.size != row.stored_size:
        return f"stored_size is {row.stored_size}, the file has {opened.size}"
    again = _crop(row, config.buckets.table().nearest(opened.size), config, row.crop)
    if again != row:
        return "planning it again gives another crop"
    assert row.resized_size
    assert row.crop_top_left
    assert row.target_size
    height, width = row.resized_size
    image = opened.image
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    whole = np.asarray(image)
    whole = whole[:, ::-1] if row.flipped else whole
    top, left = row.crop_top_left
    cut = whole[top : top + row.target_size[0], left : left + row.target_size[1]]
    return None if np.array_equal(cut, pixels) else "the recorded crop gives other pixels"
