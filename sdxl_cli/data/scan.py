"""From pictures to manifest rows: open each one, choose its bucket, plan its crops; and prove it afterwards."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image

from sdxl_cli.data.geometry import apply_crop
from sdxl_cli.data.hygiene import Refused, open_picture, read_header
from sdxl_cli.data.manifest import DatasetConfig, Manifest, Row
from sdxl_cli.data.planning import decide, planned_again
from sdxl_cli.data.pool import CHUNK, chunks, in_processes
from sdxl_cli.data.remainder import merge_remainders
from sdxl_cli.data.storage import Root, open_storage
from sdxl_cli.data.tables import Item

CountTokens = Callable[[str], tuple[int, int]]
"""A caption -> how many tokens CLIP-L and bigG make of it, without start and end. Must be a plain function."""

Engine = Literal["local", "ray"]


@dataclass(frozen=True, slots=True)
class Look:
    """Looks at pictures; what a worker is given."""

    root: Root
    config: DatasetConfig
    count_tokens: CountTokens | None = None

    def __call__(self, items: Sequence[Item]) -> list[Row]:
        """What the files are, as far as it can be told, in the items' order."""
        with warnings.catch_warnings():
            # what is wrong with a picture is its row's to say; max_pixels decides about bombs
            warnings.filterwarnings("ignore", module="PIL")
            return [self._look(item) for item in items]

    def lost(self, item: Item) -> Row:
        """The row of a picture that no worker survives."""
        return replace(self._begun(item), fate="crashed")

    def _begun(self, item: Item) -> Row:
        tokens = [self.count_tokens(caption) for caption in item.captions] if self.count_tokens else []
        return Row(
            path=item.path,
            captions=item.captions,
            tokens_clip_l=tuple(clip_l for clip_l, _ in tokens),
            tokens_big_g=tuple(big_g for _, big_g in tokens),
            aesthetic_score=item.aesthetic_score,
            repeats=item.repeats,
        )

    def _look(self, item: Item) -> Row:
        row = self._begun(item)
        if item.problem:
            return replace(row, fate=item.problem)
        try:
            data = open_storage(self.root).read(item.path)
            row = replace(row, sha256=hashlib.sha256(data).hexdigest())
            suffix = PurePosixPath(item.path).suffix
            see = open_picture if self.config.check == "pixels" else read_header
            seen = see(data, self.config.hygiene, suffix=suffix)
        except Refused as refusal:
            return replace(row, fate=refusal.reason, detail=str(refusal).partition(": ")[2])
        return replace(
            row,
            original_size=item.original_size or seen.size,
            stored_size=seen.size,
            orientation=seen.orientation,
            notes=seen.notes,
        )


def scan(
    root: Root,
    items: Sequence[Item],
    config: DatasetConfig,
    *,
    workers: int = 1,
    count_tokens: CountTokens | None = None,
    engine: Engine = "local",
) -> Iterator[list[Row]]:
    """The rows of every item, in the items' order, the same whatever looks at them.

    Unless ``check = "header"``, every picture is decoded completely, so that a truncated one is found now and not in
    the night. Rows are not merged yet; see :func:`finished`.

    Args:
        root: what the items' paths start from.
        items: see :func:`sdxl_cli.data.sources.find`.
        config: what is decided by.
        workers: processes; 1 works in this one.
        count_tokens: fills in the token counts.
        engine: ``ray`` looks at pictures on a Ray cluster.
    """
    table = config.buckets.table()
    seen: set[str] = set()
    look = Look(root, config, count_tokens)
    for rows in _looked(look, items, workers, engine):
        for row in rows:
            yield decide(row, table, config, seen)


def _looked(look: Look, items: Sequence[Item], workers: int, engine: Engine) -> Iterator[list[Row]]:
    if engine == "ray":
        from sdxl_cli.data.ray_engine import on_ray

        yield from on_ray(look, items)
    elif workers == 1 or len(items) <= CHUNK:
        yield from (look(chunk) for chunk in chunks(items, 1))
    else:
        yield from in_processes(look, items, workers)


def finished(rows: Sequence[Row], config: DatasetConfig) -> tuple[Row, ...]:
    """All rows of a scan, with what fills no batch merged when ``remainder = "merge"``."""
    return tuple(merge_remainders(rows, config) if config.remainder == "merge" else rows)


def read_pixels(root: Root, row: Row, config: DatasetConfig) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The training pixels of a kept row, ``uint8 [height, width, 3]`` of its bucket.

    Raises:
        Refused: the file is gone, or is not the one the row was made from.
    """
    data = open_storage(root).read(row.path)
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
        opened = open_picture(open_storage(manifest.root).read(row.path), config.hygiene)
    except Refused as refusal:
        return str(refusal)
    if opened.size != row.stored_size:
        return f"stored_size is {row.stored_size}, the file has {opened.size}"
    if planned_again(row, config.buckets.table(), config, opened.size) != row:
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
