"""Batches for training, from pictures or from caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdxl_cli.data.buckets import Size
from sdxl_cli.data.cache import LatentCache, TextCache
from sdxl_cli.data.hygiene import Refused
from sdxl_cli.data.manifest import Manifest, Remainder, Row
from sdxl_cli.data.sampler import BucketSampler, PlannedBatch, choose_caption
from sdxl_cli.data.scan import read_pixels
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.model.conditioning import TextFeatures


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
    weight: Tensor
    """float32 ``[B]``: what each picture's loss is multiplied with before the mean over the batch, so that all
    pictures count alike; 1 in a whole batch."""
    text: TextFeatures | None = None
    """Features of ``captions``, when they are cached."""
    places: tuple[int, ...] = ()
    """Of each among the pictures that all ranks have in this step; empty for 0, 1, 2, …"""

    def __len__(self) -> int:
        return len(self.ids)


class BatchLoader:
    """Batch number ``step`` of a run, whichever step is asked for; the next ones are read meanwhile.

    A batch is a function of (seed, step, batch size, rank, world size, remainder): a run that stops at any step goes
    on with exactly the batches that it would have had, without replaying those before.
    """

    def __init__(
        self,
        manifest: Manifest,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        together: int | None = None,
        parts: int = 1,
        remainder: Remainder | None = None,
        cache: LatentCache | None = None,
        text: TextCache | None = None,
        aesthetic_score: float = 6.0,
        workers: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Args:
            manifest: its kept rows are used.
            batch_size: pictures per step and rank; less at the end of a bucket, see ``remainder``.
            seed: decides order and captions; the same on every rank.
            rank: of this process, from 0 to ``world_size`` - 1.
            world_size: processes that train together; their batches of a step are disjoint and of one bucket.
            together: see :class:`~sdxl_cli.data.sampler.BucketSampler`.
            parts: likewise; a step is then so many batches.
            remainder: what becomes of pictures that fill no step; None does what the manifest says.
            cache: read latents from it instead of pictures; it must hold every kept row.
            text: read features of captions from it; it must hold every caption, and has the empty text for dropout.
            aesthetic_score: for pictures that have none (facts: 6.0 is what generation asks for).
            workers: threads that read ahead; 0 reads when asked. Decoding and resizing let other threads run.
            prefetch: batches that are read ahead.
            pin_memory: put batches where a CUDA device copies them from without waiting.

        Raises:
            UsageError: no picture is kept, a cache lacks some, or memory cannot be pinned.
        """
        rows = _usable(manifest, cache, text)
        if pin_memory and not torch.cuda.is_available():
            raise UsageError("pin_memory needs a CUDA device, and there is none; leave it off")
        self.manifest, self.cache, self.text, self.seed = manifest, cache, text, seed
        self.sampler = BucketSampler(
            rows,
            batch_size,
            seed,
            rank=rank,
            world_size=world_size,
            together=together,
            parts=parts,
            remainder=remainder or manifest.config.remainder,
        )
        self._default_score = aesthetic_score
        self._pin = pin_memory
        self._pool = ThreadPoolExecutor(workers, "pictures") if workers else None
        self._prefetch = prefetch if workers else 0
        self._ahead: dict[int, _Reading] = {}

    def batch(self, step: int) -> Batch:
        """The batch of that step, counted from the start of the run.

        Raises:
            FileError: a picture was removed or changed since the manifest was made.
        """
        wanted = range(step, step + self._prefetch + 1)
        for other in self._ahead.keys() - set(wanted):
            self._ahead.pop(other).cancel()
        for other in wanted:
            if other not in self._ahead:
                self._ahead[other] = self._begin(self.sampler.at(other))
        reading = self._ahead.pop(step)
        reading.wait()
        return self._described(reading)

    def close(self) -> None:
        """Stop reading ahead."""
        for reading in self._ahead.values():
            reading.cancel()
        self._ahead.clear()
        if self._pool:
            self._pool.shutdown()

    def _begin(self, planned: PlannedBatch) -> _Reading:
        rows = [self.sampler.rows[index] for index in planned.indices]
        reading = _Reading(planned, rows)
        if self.cache is None:
            height, width = planned.bucket
            reading.images = torch.empty(len(rows), 3, height, width, pin_memory=self._pin)
            jobs = [(reading.read_image, self.manifest, place) for place in range(len(rows))]
            reading.futures += [self._do(*job) for job in jobs]
        else:
            reading.futures.append(self._do(self._read_latents, reading))
        if self.text is not None:
            reading.futures.append(self._do(self._read_text, reading))
        return reading

    def _do(self, work: Callable[..., None], *args: object) -> Future[None]:
        if self._pool:
            return self._pool.submit(work, *args)
        done: Future[None] = Future()
        work(*args)
        done.set_result(None)
        return done

    def _read_latents(self, reading: _Reading) -> None:
        assert self.cache
        reading.latents = Latents(*(self._placed(t) for t in self.cache.read(reading.rows)))

    def _read_text(self, reading: _Reading) -> None:
        assert self.text
        features = self.text.read(self._captions(reading))
        reading.text = TextFeatures(self._placed(features.crossattn), self._placed(features.pooled))

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin else tensor

    def _captions(self, reading: _Reading) -> list[str]:
        return [choose_caption(row, self.seed, reading.planned.epoch) for row in reading.rows]

    def _described(self, reading: _Reading) -> Batch:
        rows = reading.rows
        return Batch(
            images=reading.images,
            latents=reading.latents,
            captions=self._captions(reading),
            original_size=[row.original_size or row.plan.resized_size for row in rows],
            crop_top_left=[row.plan.crop_top_left for row in rows],
            target_size=[row.plan.target_size for row in rows],
            aesthetic_score=[
                self._default_score if row.aesthetic_score is None else row.aesthetic_score for row in rows
            ],
            ids=[row.path for row in rows],
            weight=torch.tensor(reading.planned.weights),
            text=reading.text,
            places=reading.planned.places,
        )


def kept_rows(manifest: Manifest) -> tuple[Row, ...]:
    """What there is to train on.

    Raises:
        UsageError: there is nothing.
    """
    if not manifest.kept:
        raise UsageError("the manifest keeps no pictures; look at the fates it gives")
    return manifest.kept


def _usable(manifest: Manifest, cache: LatentCache | None, text: TextCache | None) -> tuple[Row, ...]:
    """The kept rows, all of which the caches hold."""
    rows = kept_rows(manifest)
    if cache is not None and (missing := cache.missing(rows)):
        raise UsageError(
            f"{cache.folder}: {len(missing)} of {len(rows)} crops are not cached; cache them first"
        )
    captions = [caption for row in rows for caption in row.captions or ("",)]
    if text is not None and (silent := text.missing(captions)):
        raise UsageError(
            f"{text.folder}: {len(silent)} captions are not cached, such as {silent[0]!r}; cache them first"
        )
    return rows


class _Reading:
    """A batch that is being read."""

    def __init__(self, planned: PlannedBatch, rows: Sequence[Row]) -> None:
        self.planned, self.rows = planned, rows
        self.images: Tensor | None = None
        self.latents: Latents | None = None
        self.text: TextFeatures | None = None
        self.futures: list[Future[None]] = []

    def read_image(self, manifest: Manifest, place: int) -> None:
        """Put one picture in its place."""
        assert self.images is not None
        self.images[place].copy_(read_image(manifest, self.rows[place]))

    def wait(self) -> None:
        """Until everything is there; raises what went wrong."""
        for future in self.futures:
            future.result()

    def cancel(self) -> None:
        """Do not begin what is not begun."""
        for future in self.futures:
            future.cancel()


def read_image(manifest: Manifest, row: Row) -> Tensor:
    """The training pixels of a kept row, float32 ``[3, H, W]`` in -1..1.

    Raises:
        FileError: the picture was removed or changed since the manifest was made.
    """
    try:
        pixels = read_pixels(manifest.root, row, manifest.config)
    except Refused as refusal:
        raise FileError(f"{manifest.root}/{row.path}: {refusal}; make the manifest again") from refusal
    return to_tensor(pixels)


def to_tensor(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """``uint8 [H, W, 3]`` as float32 ``[3, H, W]`` in -1..1, 0 to -1 and 255 to 1."""
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div(127.5).sub(1)
