"""Batches for training, from pictures or from cached latents."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdxl_cli.data.buckets import Size
from sdxl_cli.data.cache import LatentCache
from sdxl_cli.data.hygiene import Refused
from sdxl_cli.data.manifest import Manifest, Row
from sdxl_cli.data.sampler import BucketSampler, PlannedBatch, choose_caption
from sdxl_cli.data.scan import read_pixels
from sdxl_cli.errors import FileError, UsageError


@dataclass(frozen=True, slots=True)
class Latents:
    """Moments of the autoencoder's posterior, unscaled, float32 ``[B, 4, H/8, W/8]``."""

    mean: Tensor
    logvar: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures of one bucket with what is said about them. Sizes are (height, width), crops (top, left)."""

    images: Tensor | None
    """float32 ``[B, 3, H, W]`` in -1..1; None when latents are there instead."""
    latents: Latents | None
    captions: list[str]
    original_size: list[Size]
    crop_top_left: list[tuple[int, int]]
    target_size: list[Size]
    aesthetic_score: list[float]
    ids: list[str]
    """Path of each picture, below the manifest's root."""

    def __len__(self) -> int:
        return len(self.ids)


class BatchLoader:
    """Batch number ``step`` of a run, whichever step is asked for; the next one is read meanwhile."""

    def __init__(
        self,
        manifest: Manifest,
        batch_size: int,
        *,
        seed: int = 0,
        cache: LatentCache | None = None,
        aesthetic_score: float = 6.0,
        workers: int = 1,
    ) -> None:
        """Args:
            manifest: its kept rows are used.
            batch_size: pictures per step; less at the end of a bucket.
            seed: decides order and captions.
            cache: read latents from it instead of pictures; it must hold every kept row.
            aesthetic_score: for pictures that have none (facts: 6.0 is what generation asks for).
            workers: threads that read ahead; 0 reads when asked.

        Raises:
            UsageError: no picture is kept, or the cache lacks some.
        """
        rows = manifest.kept
        if not rows:
            raise UsageError("the manifest keeps no pictures; look at the fates it gives")
        if cache is not None and (missing := cache.missing(rows)):
            raise UsageError(
                f"{cache.folder}: {len(missing)} of {len(rows)} crops are not cached; cache them first"
            )
        self.manifest, self.cache, self.seed = manifest, cache, seed
        self.sampler = BucketSampler(rows, batch_size, seed)
        self._default_score = aesthetic_score
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._ahead: dict[int, list[Future[Tensor]]] = {}

    def batch(self, step: int) -> Batch:
        """The batch of that step, counted from the start of the run.

        Raises:
            FileError: a picture was removed or changed since the manifest was made.
        """
        planned = self.sampler.at(step)
        rows = [self.sampler.rows[index] for index in planned.indices]
        if self.cache is not None:
            return self._described(rows, planned, None, Latents(*self.cache.read(rows)))
        if self._pool is None:
            images = torch.stack([read_image(self.manifest, row) for row in rows])
        else:
            futures = self._ahead.pop(step, None) or self._submit(planned)
            self._ahead = {step + 1: self._submit(self.sampler.at(step + 1))}
            images = torch.stack([future.result() for future in futures])
        return self._described(rows, planned, images, None)

    def _submit(self, planned: PlannedBatch) -> list[Future[Tensor]]:
        assert self._pool
        rows = [self.sampler.rows[index] for index in planned.indices]
        return [self._pool.submit(read_image, self.manifest, row) for row in rows]

    def _described(
        self, rows: Sequence[Row], planned: PlannedBatch, images: Tensor | None, latents: Latents | None
    ) -> Batch:
        return Batch(
            images=images,
            latents=latents,
            captions=[choose_caption(row, self.seed, planned.epoch) for row in rows],
            original_size=[row.original_size or row.plan.resized_size for row in rows],
            crop_top_left=[row.plan.crop_top_left for row in rows],
            target_size=[row.plan.target_size for row in rows],
            aesthetic_score=[
                self._default_score if row.aesthetic_score is None else row.aesthetic_score for row in rows
            ],
            ids=[row.path for row in rows],
        )


def read_image(manifest: Manifest, row: Row) -> Tensor:
    """The training pixels of a kept row, float32 ``[3, H, W]`` in -1..1.

    Raises:
        FileError: the picture was removed or changed since the manifest was made.
    """
    try:
        pixels = read_pixels(manifest.root, row, manifest.config)
    except Refused as refusal:
        raise FileError(f"{manifest.root / row.path}: {refusal}; make the manifest again") from refusal
    return to_tensor(pixels)


def to_tensor(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """``uint8 [H, W, 3]`` as float32 ``[3, H, W]`` in -1..1, 0 to -1 and 255 to 1."""
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div(127.5).sub(1)
