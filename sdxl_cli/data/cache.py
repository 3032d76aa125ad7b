"""What is computed once: the autoencoder's moments of every crop, and the text encoders' features of every caption."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.checkpoint.write import save_tensors
from sdxl_cli.data.hygiene import Hygiene
from sdxl_cli.data.manifest import Row
from sdxl_cli.errors import FileError, NumericError
from sdxl_cli.model.conditioning import TextFeatures

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""images float32 ``[B, 3, H, W]`` in -1..1 -> (mean, logvar), each ``[B, 4, H/8, W/8]``, unscaled."""

EncodeText = Callable[[Sequence[str]], TextFeatures]
"""captions -> features, ``[B, 77, width]`` and ``[B, pooled width]``."""

_GROUPS_AHEAD = 3
"""Batches of pictures that are read while one is encoded, that one included."""
_LATENTS, _TEXT = "latents-", "text-"

MAKER_KEY = "sdxl.latents"
"""Metadata of a shard: what its items were made with, as JSON."""


def shards(folder: Path) -> list[Path]:
    """The shards of latents in a folder, by name."""
    return sorted(folder.glob(f"{_LATENTS}*.safetensors"))


class _Shards:
    """Tensors by key in a folder of safetensors files, read by memory map; files appear whole or not at all."""

    def __init__(self, folder: Path, prefix: str, maker: str) -> None:
        """Raises FileError: a shard is damaged."""
        self.folder, self._prefix, self._maker = folder, prefix, maker
        self.where: dict[str, TensorFile] = {}
        for path in sorted(folder.glob(f"{prefix}*.safetensors")):
            self._open(path)

    def write(self, items: Mapping[str, Tensor]) -> None:
        """Add a shard."""
        # Named by its content: two processes filling one folder do not meet.
        name = hashlib.sha256("".join(sorted(items)).encode()).hexdigest()[:16]
        path = self.folder / f"{self._prefix}{name}.safetensors"
        save_tensors(path, {key: item.clone() for key, item in items.items()}, {MAKER_KEY: self._maker})
        self._open(path)

    def read(self, key: str, what: str) -> Tensor:
        """One tensor. Raises FileError: ``what`` is not there."""
        shard = self.where.get(key)
        if shard is None:
            raise FileError(f"{self.folder}: nothing is cached for {what} as it is now; cache it again")
        return shard.read(key)

    def _open(self, path: Path) -> None:
        shard = TensorFile(path)
        self.where |= dict.fromkeys(shard.shapes, shard)


class LatentCache:
    """A folder of shards. An item is known by what made it; whatever changes that makes it another item.

    The key hashes the file's content, the crop, how pictures are opened, the autoencoder and the dtype. A picture
    that is replaced, a row with another crop or another autoencoder is thus missing and gets encoded, and only
    that one. Shards appear whole, so an interrupted run loses at most the shard it was filling.
    """

    def __init__(
        self, folder: Path, vae_hash: str, hygiene: Hygiene, *, dtype: torch.dtype = torch.float16
    ) -> None:
        """Args:
            folder: made when first written to.
            vae_hash: names the autoencoder's weights; see :func:`weights_hash`.
            hygiene: of the manifest whose rows are cached.
            dtype: that moments are stored in; float16 keeps three digits.

        Raises:
            FileError: a shard is damaged.
        """
        self.folder, self.dtype = folder, dtype
        self._maker = json.dumps([vae_hash, str(dtype), asdict(hygiene)])
        self._shards = _Shards(folder, _LATENTS, self._maker)

    def key(self, row: Row) -> str:
        """The name of a kept row's item, 32 hexadecimal digits."""
        plan = row.plan
        crop = [plan.resized_size, plan.crop_top_left, plan.target_size, plan.flipped]
        return hashlib.sha256(f"{row.sha256}\n{crop}\n{self._maker}".encode()).hexdigest()[:32]

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Rows whose item is not there, one for each item."""
        absent = {key: row for row in rows if (key := self.key(row)) not in self._shards.where}
        return list(absent.values())

    def stale(self, rows: Sequence[Row]) -> int:
        """Items that none of ``rows`` asks for: of another autoencoder, crop or content."""
        return len(self._shards.where.keys() - {self.key(row) for row in rows})

    def read(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of rows of one bucket, float32 ``[B, 4, h, w]``.

        Raises:
            FileError: an item is not there, or its shard changed.
        """
        moments = [self._shards.read(self.key(row), row.path) for row in rows]
        mean, logvar = torch.stack(moments).to(torch.float32).unbind(1)
        return mean, logvar

    def fill(
        self,
        rows: Sequence[Row],
        read_image: Callable[[Row], Tensor],
        encode: Encode,
        *,
        batch_size: int = 8,
        shard_items: int = 512,
        workers: int = 1,
    ) -> Iterator[int]:
        """Encode what is missing; yields how many items were added after each batch.

        Args:
            rows: kept rows.
            read_image: the pixels of a row, float32 ``[3, H, W]`` in -1..1.
            encode: the autoencoder.
            batch_size: pictures of one bucket at a time.
            shard_items: items in a shard, about.
            workers: threads that read pictures ahead of the autoencoder.

        Raises:
            NumericError: the autoencoder gave NaN or infinity.
            FileError: a picture or the folder cannot be used.
        """
        waiting: dict[str, Tensor] = {}
        pictures = _ahead(_batches(self.missing(rows), batch_size), read_image, workers)
        try:
            for group, images in pictures:
                mean, logvar = encode(images)
                moments = torch.stack([mean, logvar], 1).to("cpu", self.dtype)
                if not bool(torch.isfinite(moments).all()):
                    raise NumericError(
                        f"the autoencoder gave NaN or infinity for one of {', '.join(r.path for r in group)}; "
                        "encode in float32"
                    )
                waiting |= {self.key(row): item for row, item in zip(group, moments.unbind(), strict=True)}
                if len(waiting) >= shard_items:
                    self._shards.write(waiting)
                    waiting = {}
                yield len(group)
        finally:
            pictures.close()
            if waiting:
                self._shards.write(waiting)


class TextCache:
    """A folder of shards with what the text encoders make of captions, and of the empty text.

    The key hashes the caption, the encoders' weights and the dtype.
    """

    def __init__(self, folder: Path, encoders_hash: str, *, dtype: torch.dtype = torch.float16) -> None:
        """Args:
            folder: made when first written to; may hold latents too.
            encoders_hash: names the encoders' weights; see :func:`weights_hash`.
            dtype: that features are stored in.

        Raises:
            FileError: a shard is damaged.
        """
        self.folder, self.dtype = folder, dtype
        self._maker = json.dumps([encoders_hash, str(dtype)])
        self._shards = _Shards(folder, _TEXT, self._maker)

    def key(self, caption: str) -> str:
        """The name of a caption's item, 32 hexadecimal digits."""
        return hashlib.sha256(f"{caption}\n{self._maker}".encode()).hexdigest()[:32]

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Captions whose features are not there, each once."""
        return [c for c in dict.fromkeys(captions) if f"{self.key(c)}.pooled" not in self._shards.where]

    def stale(self, captions: Iterable[str]) -> int:
        """Items that none of ``captions`` and the empty text ask for."""
        asked = {self.key(caption) for caption in ["", *captions]}
        return len({name.partition(".")[0] for name in self._shards.where} - asked)

    def read(self, captions: Sequence[str]) -> TextFeatures:
        """Features, float32 ``[B, 77, width]`` and ``[B, pooled width]``.

        Raises:
            FileError: one is not there.
        """
        parts = [
            torch.stack([self._shards.read(f"{self.key(c)}.{part}", repr(c)) for c in captions]).float()
            for part in ("crossattn", "pooled")
        ]
        return TextFeatures(*parts)

    def fill(
        self, captions: Iterable[str], encode: EncodeText, *, batch_size: int = 32, shard_items: int = 512
    ) -> Iterator[int]:
        """Encode what is missing, the empty text with it; yields how many were added after each batch.

        Raises:
            NumericError: the encoders gave NaN or infinity.
            FileError: the folder cannot be written to.
        """
        missing = self.missing(["", *captions])
        waiting: dict[str, Tensor] = {}
        try:
            for start in range(0, len(missing), batch_size):
                group = missing[start : start + batch_size]
                waiting |= self._encoded(group, encode(group))
                if len(waiting) >= 2 * shard_items:
                    self._shards.write(waiting)
                    waiting = {}
                yield len(group)
        finally:
            if waiting:
                self._shards.write(waiting)

    def _encoded(self, captions: Sequence[str], features: TextFeatures) -> dict[str, Tensor]:
        parts = {"crossattn": features.crossattn, "pooled": features.pooled}
        stored = {part: values.to("cpu", self.dtype) for part, values in parts.items()}
        if not all(bool(torch.isfinite(values).all()) for values in stored.values()):
            raise NumericError(
                f"the text encoders gave NaN or infinity for one of {list(captions)}; encode in float32"
            )
        return {
            f"{self.key(caption)}.{part}": value
            for part, values in stored.items()
            for caption, value in zip(captions, values.unbind(), strict=True)
        }


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of a state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _ahead(
    groups: Iterator[list[Row]], read_image: Callable[[Row], Tensor], workers: int
) -> Generator[tuple[list[Row], Tensor], None, None]:
    """Each group with its pictures, read while those before are worked on."""
    with ThreadPoolExecutor(workers, "pictures") as pool:
        waiting: deque[tuple[list[Row], list[Future[Tensor]]]] = deque()
        try:
            while True:
                while len(waiting) < _GROUPS_AHEAD and (group := next(groups, None)) is not None:
                    waiting.append((group, [pool.submit(read_image, row) for row in group]))
                if not waiting:
                    return
                group, futures = waiting.popleft()
                yield group, torch.stack([future.result() for future in futures])
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()


def _batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Rows of one bucket at a time, in their order otherwise."""
    open_: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        group = open_.setdefault(row.plan.target_size, [])
        group.append(row)
        if len(group) == batch_size:
            yield open_.pop(row.plan.target_size)
    yield from open_.values()
