"""Every byte of a checkpoint, once: its hashes, and the numbers in it that are none."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.finite import count_non_finite
from sdxl_cli.checkpoint.header import Header, is_pickle, read_header
from sdxl_cli.checkpoint.pickle_file import PickleFile
from sdxl_cli.checkpoint.tensor_file import DTYPES
from sdxl_cli.errors import FileError

_CHUNK = 1 << 22
"""Bytes looked at at a time; a multiple of every item's size."""
_OLD_START, _OLD_LENGTH = 0x100000, 0x10000
"""The 64 kB that A1111's first model hash was taken of."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """The names a file goes by."""

    sha256: str
    """Of the whole file."""
    autov1: str
    """A1111's model hash of 2022: 8 digits, of 64 kB from the second megabyte on."""
    content: str | None
    """sha256 of a safetensors file after its header: ``modelspec.hash_sha256``, and A1111's hash of a LoRA, which
    editing metadata does not change. None for pickles."""

    @property
    def autov2(self) -> str:
        """A1111's ``Model hash``: the first 10 digits of :attr:`sha256`."""
        return self.sha256[:10]

    @property
    def autov3(self) -> str | None:
        """A1111's ``Lora hashes``, and Civitai's AutoV3: the first 12 digits of :attr:`content`."""
        return self.content[:12] if self.content else None


@dataclass(frozen=True, slots=True)
class NotFinite:
    """A tensor with numbers that are none."""

    name: str
    nan: int
    infinite: int


@dataclass
class Scan:
    """What the bytes of one file told."""

    hashes: Hashes
    not_finite: list[NotFinite] = field(default_factory=list)
    all_zero: list[str] = field(default_factory=list)
    """Matrices and kernels without any number but 0, which training does not leave behind."""


def scan_file(path: Path, done: Callable[[int], None]) -> Scan:
    """Read a file from end to end, in a few megabytes of memory for safetensors.

    Args:
        path: safetensors, or a pickle of torch.
        done: called with the number of bytes after each step.

    Raises:
        FileError: it is damaged, or becomes shorter while it is read.
    """
    return _scan_pickle(path, done) if is_pickle(path) else _scan_safetensors(read_header(path), done)


def _scan_safetensors(header: Header, done: Callable[[int], None]) -> Scan:
    whole, content = hashlib.sha256(), hashlib.sha256()
    scan = Scan(Hashes("", "", None))
    first = min((entry.start for entry in header.entries.values()), default=header.size)
    with header.path.open("rb", buffering=0) as file:
        for chunk in _chunks(file, header.path, first):
            whole.update(chunk)
        for name, entry in header.entries.items():
            tally = _Tally(name, DTYPES.get(entry.dtype))
            for chunk in _chunks(file, header.path, entry.end - entry.start):
                whole.update(chunk)
                content.update(chunk)
                tally.look(chunk)
                done(len(chunk))
            tally.report(scan, is_matrix=len(entry.shape) > 1 and math.prod(entry.shape) > 0)
    scan.hashes = Hashes(whole.hexdigest(), _autov1(header.path), content.hexdigest())
    return scan


def _scan_pickle(path: Path, done: Callable[[int], None]) -> Scan:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    scan, tensors = Scan(Hashes(digest, _autov1(path), None)), PickleFile(path)
    for name in tensors.shapes:
        tensor = tensors.read(name)
        tally = _Tally(name, tensor.dtype)
        tally.look_at(tensor)
        tally.report(scan, is_matrix=tensor.ndim > 1 and tensor.numel() > 0)
        done(tensor.numel() * tensor.element_size())
    return scan


class _Tally:
    """What is found in one tensor, piece by piece."""

    def __init__(self, name: str, dtype: torch.dtype | None) -> None:
        self.name, self.dtype = name, dtype
        self.nan = self.infinite = 0
        self.any = False

    def look(self, chunk: bytearray) -> None:
        if self.dtype is not None:
            self.look_at(torch.frombuffer(chunk, dtype=self.dtype))

    def look_at(self, tensor: Tensor) -> None:
        nan, infinite = count_non_finite(tensor)
        self.nan += nan
        self.infinite += infinite
        self.any = self.any or bool(tensor.contiguous().reshape(-1).view(torch.uint8).any())

    def report(self, scan: Scan, *, is_matrix: bool) -> None:
        if self.nan or self.infinite:
            scan.not_finite.append(NotFinite(self.name, self.nan, self.infinite))
        if is_matrix and not self.any and self.dtype is not None and self.dtype.is_floating_point:
            scan.all_zero.append(self.name)


def _chunks(file: FileIO, path: Path, size: int) -> Iterator[bytearray]:
    while size:
        chunk = bytearray(min(_CHUNK, size))
        view = memoryview(chunk)
        while view:
            count = file.readinto(view)
            if not count:
                raise FileError(f"{path} became shorter while it was read")
            view = view[count:]
        size -= len(chunk)
        yield chunk


def _autov1(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(_OLD_START)
        return hashlib.sha256(file.read(_OLD_LENGTH)).hexdigest()[:8]
