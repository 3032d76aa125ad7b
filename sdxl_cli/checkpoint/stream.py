"""Writing safetensors tensor by tensor: each is made when its turn comes and forgotten once it is on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.checkpoint.tensor_file import DTYPES
from sdxl_cli.errors import SdxlError

HASH_KEY = "modelspec.hash_sha256"
"""Metadata: the hash of all bytes after the header."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BODY_HASH = "0" * 64
"""A value in the metadata that becomes the hash of all bytes after the header, in hexadecimal digits."""
_CHUNK = 1 << 24
"""Bytes written at a time."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A tensor that will be there when it is wanted."""

    dtype: torch.dtype
    """As it will be in the file; ``make`` may give another, which is cast."""
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_pending(
    path: Path | str,
    tensors: Mapping[str, Pending],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = True,
) -> None:
    """Write tensors as safetensors, widest dtype first and then by name, so that the same tensors give the same bytes.

    Args:
        path: see :func:`sdxl_cli.checkpoint.atomic.atomic_write`.
        tensors: by name.
        metadata: text by name; ``modelspec.hash_sha256``, the hash of all tensor bytes, is added, and takes the
            place of :data:`BODY_HASH`.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileError: the file exists (with ``overwrite=False``) or cannot be written.
        SdxlError: the disk is full.
    """
    path = Path(path)
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    notes = {str(key): str(value) for key, value in (metadata or {}).items()} | {HASH_KEY: f"0x{BODY_HASH}"}
    header = _header({name: tensors[name] for name in order}, notes)
    with atomic_write(path, overwrite=overwrite) as temporary:
        require_room(path, len(header) + sum(tensor.size for tensor in tensors.values()))
        with temporary.open("wb") as file:
            file.write(header)
            digest = _write_all(file, (tensors[name] for name in order))
            file.seek(0)
            file.write(header.replace(BODY_HASH.encode(), digest.encode()))


def require_room(path: Path, size: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        path: what is to be written; its folder need not exist yet.
        size: bytes.

    Raises:
        SdxlError: there is less free space than ``size``.
    """
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SdxlError(
            f"{path} needs {format_bytes(size)}, the disk has {format_bytes(free)} free; make room"
        )


def shards(tensors: Mapping[str, Pending], limit: int) -> Iterator[dict[str, Pending]]:
    """Split tensors, in their order, into parts of at most ``limit`` bytes, or of one tensor; 0 never splits."""
    part: dict[str, Pending] = {}
    used = 0
    for name, tensor in tensors.items():
        if limit and part and used + tensor.size > limit:
            yield part
            part, used = {}, 0
        part[name] = tensor
        used += tensor.size
    yield part


def _write_all(file: BinaryIO, tensors: Iterable[Pending]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        stored = tensor.make().detach().to(dtype=tensor.dtype).cpu().contiguous()
        data = memoryview(stored.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(data), _CHUNK):
            digest.update(data[start : start + _CHUNK])
            file.write(data[start : start + _CHUNK])
    return digest.hexdigest()


def _header(tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.size
        table[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    return len(text).to_bytes(8, "little") + text
