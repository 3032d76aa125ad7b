"""What can be inspected: picture files, the crops of a manifest, cached moments, latents in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from sdxl_cli.checkpoint.identify import identify
from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.data.cache import MAKER_KEY, shards
from sdxl_cli.data.hygiene import Hygiene, Refused, open_picture
from sdxl_cli.data.loader import read_image, to_tensor
from sdxl_cli.data.manifest import Row, read_manifest
from sdxl_cli.data.sources import find
from sdxl_cli.data.storage import open_storage
from sdxl_cli.errors import FileError

T = TypeVar("T")
MANIFESTS = (".parquet", ".jsonl")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that an autoencoder has to encode first."""

    name: str
    load: Callable[[], Tensor]
    """float32 [3, H, W] in -1 … 1; raises FileError when it cannot be used."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Latents that were encoded before."""

    name: str
    load: Callable[[], tuple[Tensor, Tensor | None]]
    """(values [z, h, w], None), or (mean, log-variance) of a posterior; of any floating-point type."""
    path: Path | None = None
    """The file they are in; None for those that were just made."""
    channels: int = 0
    """z, for those of a file."""


Item = Picture | Stored


def find_inputs(paths: Sequence[Path], max_side: int) -> list[Item]:
    """Everything that ``paths`` stand for, in their order; nothing is decoded yet.

    Args:
        paths: pictures, folders of pictures or of a latent cache, manifests, safetensors files of latents.
        max_side: picture files with a longer side are shrunk to it, in pixels; 0 leaves them.

    Raises:
        FileError: one is missing, or holds nothing of the kind.
    """
    return [item for path in paths for item in _found(path, max_side)]


def chosen(items: Sequence[T], limit: int) -> list[T]:
    """``limit`` of the items, evenly spread over them; all of them when it is 0."""
    if not limit or len(items) <= limit:
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def _found(path: Path, max_side: int) -> Iterator[Item]:
    if path.is_dir():
        files = shards(path)
        yield from (item for file in files for item in _latents(file))
        if not files:
            yield from (_picture(path, item.path, max_side) for item in find(path).items)
    elif not path.exists():
        raise FileError(f"{path}: no such file or folder")
    elif path.suffix == ".safetensors":
        yield from _latents(path)
    elif path.suffix in MANIFESTS:
        yield from _rows(path)
    else:
        yield _picture(path.parent, path.name, max_side)


def _picture(root: Path, name: str, max_side: int) -> Picture:
    path = root / name

    def load() -> Tensor:
        try:
            image = open_picture(open_storage(root).read(name), Hygiene(), suffix=path.suffix).image
        except Refused as refusal:
            raise FileError(f"{path}: {refusal}") from refusal
        longest = max(image.size)
        if max_side and longest > max_side:
            width, height = (max(1, round(side * max_side / longest)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        return to_tensor(np.array(image))

    return Picture(name, load)


def _rows(path: Path) -> Iterator[Picture]:
    manifest = read_manifest(path)
    if not manifest.kept:
        raise FileError(f"{path} keeps no pictures; look at the fates it gives")

    def picture(row: Row) -> Picture:
        name = f"{row.path}#{row.crop}" if manifest.config.crops_per_image > 1 else row.path
        return Picture(name, lambda: read_image(manifest, row))

    yield from (picture(row) for row in manifest.kept)


def _latents(path: Path) -> Iterator[Stored]:
    """A shard of a latent cache holds posteriors [2, z, h, w]; other files latents [z, h, w] or [n, z, h, w]."""
    file = TensorFile(path)
    identity = identify(file.shapes, file.metadata)
    if identity.kind != "other":
        raise FileError(f"{path} is {identity.label}; give pictures or latents, and the model with --vae")
    if not file.shapes:
        raise FileError(f"{path} has no tensors")
    for name, shape in file.shapes.items():
        if not file.dtypes[name].startswith(("F", "BF")) or len(shape) not in (3, 4):
            raise FileError(
                f"{path}: {name} is {file.dtypes[name]} {list(shape)}; latents are floats [4, h, w] or [n, 4, h, w]"
            )
        if 0 in shape:
            raise FileError(f"{path}: {name} is {list(shape)}, which holds nothing; leave it out")
        channels = shape[-3]
        if MAKER_KEY in file.metadata:
            yield Stored(name, _posterior(file, name), path, channels)
        elif len(shape) == 3:
            yield Stored(name, _single(file, name, None), path, channels)
        else:
            for index in range(shape[0]):
                yield Stored(f"{name}[{index}]", _single(file, name, index), path, channels)


def require_channels(items: Sequence[Item], channels: int, whose: str) -> None:
    """Refuse stored latents that a network cannot read, before any work is done.

    Args:
        items: those that it is to read.
        channels: its latents'.
        whose: what to call it.

    Raises:
        FileError: naming the first that does not fit.
    """
    for item in items:
        if isinstance(item, Stored) and item.path is not None and item.channels != channels:
            raise FileError(
                f"{item.path}: {item.name} has {item.channels} channels, the latents of {whose} have {channels}; "
                "give the autoencoder it was made by"
            )


def _posterior(file: TensorFile, name: str) -> Callable[[], tuple[Tensor, Tensor | None]]:
    def load() -> tuple[Tensor, Tensor | None]:
        mean, logvar = file.read(name).unbind(0)
        return mean, logvar

    return load


def _single(file: TensorFile, name: str, index: int | None) -> Callable[[], tuple[Tensor, Tensor | None]]:
    return lambda: (file.read(name) if index is None else file.read(name)[index], None)
