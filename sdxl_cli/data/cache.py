"""Latents computed once: the autoencoder's moments of every crop, in safetensors shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.checkpoint.write import save_tensors
from sdxl_cli.data.hygiene import Hygiene
from sdxl_cli.data.manifest import Row
from sdxl_cli.errors import FileError, NumericError

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""images float32 ``[B, 3, H, W]`` in -1..1 -> (mean, logvar), each ``[B, 4, H/8, W/8]``, unscaled."""

_PREFIX = "latents-"

MAKER_KEY = "sdxl.latents"
"""Metadata of a shard: what its items were made with, as JSON."""


def shards(folder: Path) -> list[Path]:
    """The shards in a folder, by name."""
    return sorted(folder.glob(f"{_PREFIX}*.safetensors"))


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
        self._shards: list[TensorFile] = []
        self._where: dict[str, TensorFile] = {}
        for path in shards(folder):
            self._open(path)

    def key(self, row: Row) -> str:
        """The name of a kept row's item, 32 hexadecimal digits."""
        plan = row.plan
        crop = [plan.resized_size, plan.crop_top_left, plan.target_size, plan.flipped]
        return hashlib.sha256(f"{row.sha256}\n{crop}\n{self._maker}".encode()).hexdigest()[:32]

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Rows whose item is not there, one for each item."""
        absent = {key: row for row in rows if (key := self.key(row)) not in self._where}
        return list(absent.values())

    def stale(self, rows: Sequence[Row]) -> int:
        """Items that none of ``rows`` asks for: of another autoencoder, crop or content."""
        return len(self._where.keys() - {self.key(row) for row in rows})

    def read(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of rows of one bucket, float32 ``[B, 4, h, w]``.

        Raises:
            FileError: an item is not there, or its shard changed.
        """
        moments = [self._moments(row) for row in rows]
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
    ) -> Iterator[int]:
        """Encode what is missing; yields how many items were added after each batch.

        Args:
            rows: kept rows.
            read_image: the pixels of a row, float32 ``[3, H, W]`` in -1..1.
            encode: the autoencoder.
            batch_size: pictures of one bucket at a time.
            shard_items: items in a shard, about.

        Raises:
            NumericError: the autoencoder gave NaN or infinity.
            FileError: a picture or the folder cannot be used.
        """
        waiting: dict[str, Tensor] = {}
        try:
            for group in _batches(self.missing(rows), batch_size):
                mean, logvar = encode(torch.stack([read_image(row) for row in group]))
                moments = torch.stack([mean, logvar], 1).to("cpu", self.dtype)
                if not bool(torch.isfinite(moments).all()):
                    raise NumericError(
                        f"the autoencoder gave NaN or infinity for one of {', '.join(r.path for r in group)}; "
                        "encode in float32"
                    )
                waiting |= {self.key(row): item for row, item in zip(group, moments.unbind(), strict=True)}
                if len(waiting) >= shard_items:
                    waiting = self._write(waiting)
                yield len(group)
        finally:
            if waiting:
                self._write(waiting)

    def _write(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a shard and take it up; returns what is then waiting: nothing."""
        # Named by its content: two processes filling one folder do not meet.
        name = hashlib.sha256("".join(sorted(items)).encode()).hexdigest()[:16]
        path = self.folder / f"{_PREFIX}{name}.safetensors"
        save_tensors(path, {key: item.clone() for key, item in items.items()}, {MAKER_KEY: self._maker})
        self._open(path)
        return {}

    def _open(self, path: Path) -> None:
        shard = TensorFile(path)
        self._shards.append(shard)
        self._where |= dict.fromkeys(shard.shapes, shard)

    def _moments(self, row: Row) -> Tensor:
        key = self.key(row)
        shard = self._where.get(key)
        if shard is None:
            raise FileError(f"{self.folder}: nothing is cached for {row.path} as it is now; cache it again")
        return shard.read(key)


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of a state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Rows of one bucket at a time, in their order otherwise."""
    open_: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        group = open_.setdefault(row.plan.target_size, [])
        group.append(row)
        if len(group) == batch_size:
            yield open_.pop(row.plan.target_size)
    yield from open_.values()
