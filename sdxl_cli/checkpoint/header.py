"""What a safetensors file says about itself, read without torch: names, shapes, dtypes, metadata.

Format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, tensor bytes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_cli.errors import FileError

ITEM_SIZE: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per element of each dtype this program can read."""

MAX_HEADER = 100_000_000
"""The format's own limit on the JSON header, in bytes."""

_LEAD = 8
"""Bytes of the header's length, a little-endian integer before the header."""

_PICKLE = (
    "a pickle (.ckpt, .pt, .bin), and a safetensors file is wanted here; `sdxl convert` makes one of a model"
)
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""A zip archive, as torch writes since 1.6, and the pickle protocols before it."""

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    *((start, _PICKLE) for start in _PICKLE_STARTS),
    (b"<", "a web page, not a model; the link was wrong or needs a login: download it again"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the model itself: run `git lfs pull` where it came from",
    ),
    (b"GGUF", "a GGUF file, a quantised format this program does not read: get the safetensors file"),
    (b"{", "a JSON text, not a model: download it again"),
)
"""First bytes of files people mistake for a model, and what to say about each."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor is."""

    dtype: str
    """As the format writes it: ``F16``, ``BF16``, ``I64`` …"""
    shape: tuple[int, ...]
    start: int
    """First byte, from the beginning of the file."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors file's table of contents, in the order of the bytes."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int
    """Bytes of the whole file."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Every tensor's dtype, as the format writes it."""
        return {name: entry.dtype for name, entry in self.entries.items()}


def read_header(path: Path) -> Header:
    """Read the table of contents and check that all its bytes are there.

    Raises:
        FileError: the file is missing, unreadable, cut short, damaged, or no safetensors file; the text says which.
    """
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise FileError(f"{path} is a folder, not a file")
        with path.open("rb") as file:
            head = file.read(32)
            _refuse_other_formats(path, head, size)
            length = int.from_bytes(head[:_LEAD], "little")
            file.seek(_LEAD)
            text = file.read(length)
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) < length:
        here, table_size = format_bytes(len(text), length), format_bytes(length)
        raise FileError(
            f"{path} ends inside its table of contents ({here} of {table_size} are here); download it again"
        )
    try:
        table: Mapping[str, Any] = json.loads(text)
        metadata = {str(key): str(value) for key, value in table.get("__metadata__", {}).items()}
        entries = dict(sorted(_entries(table, _LEAD + length), key=lambda item: (item[1].start, item[1].end)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{path} ({format_bytes(size)}) has a damaged table of contents of {format_bytes(length)} ({error}); "
            "download it again"
        ) from error
    _check_extent(path, entries, size, _LEAD + length)
    return Header(path, entries, metadata, size)


def is_pickle(path: Path) -> bool:
    """Whether a file begins as torch's own files do; False for what is missing or cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError:
        return False
    return head.startswith(_PICKLE_STARTS) and not _is_safetensors(head, path.stat().st_size)


def format_bytes(count: int, unit_of: int | None = None) -> str:
    """``6938078334`` -> ``"6.9 GB"``, in the unit of ``unit_of`` when given; decimal units, as disks count."""
    scale = max(count if unit_of is None else unit_of, 1)
    power = min(int(math.log10(scale)) // 3, 4)
    unit = ("bytes", "kB", "MB", "GB", "TB")[power]
    return f"{count} bytes" if power == 0 else f"{count / 1000**power:.1f} {unit}"


def _refuse_other_formats(path: Path, head: bytes, size: int) -> None:
    if size == 0:
        raise FileError(f"{path} is empty (0 bytes); download it again")
    if _is_safetensors(head, size):
        return
    for signature, what in _SIGNATURES:
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(signature):
            raise FileError(f"{path} is {what}")
    raise FileError(f"{path} is no safetensors file; if its name says so, download it again")


def _is_safetensors(head: bytes, size: int) -> bool:
    """By the brace; some writers put spaces before it. The length may look like any other format's signature."""
    length = int.from_bytes(head[:_LEAD], "little")
    return size >= _LEAD + 2 and length <= MAX_HEADER and head[_LEAD:].lstrip().startswith(b"{")


def _entries(table: Mapping[str, Any], data: int) -> Iterator[tuple[str, Entry]]:
    for name, value in table.items():
        if name == "__metadata__":
            continue
        start, end = value["data_offsets"]
        entry = Entry(value["dtype"], tuple(int(side) for side in value["shape"]), data + start, data + end)
        expected = math.prod(entry.shape) * ITEM_SIZE.get(entry.dtype, 0)
        if start < 0 or end < start or (expected and end - start != expected):
            raise ValueError(f"{name} has {end - start} bytes, its shape and dtype want {expected}")
        yield name, entry


def _check_extent(path: Path, entries: Mapping[str, Entry], size: int, data: int) -> None:
    expected = max((entry.end for entry in entries.values()), default=data)
    if size < expected:
        here, whole = format_bytes(size, expected), format_bytes(expected)
        if here.split()[-1] == whole.split()[-1]:
            here = here.split()[0]
        raise FileError(f"{path}: {here} of {whole} are here; download it again")
    if size > expected:
        raise FileError(
            f"{path} is {size - expected} bytes longer than its contents; it is damaged: download it again"
        )
    # the format allows neither gaps nor tensors that share bytes
    position = data
    for name, entry in entries.items():
        if entry.start != position:
            raise FileError(
                f"{path} has a damaged table of contents: {name} begins at byte {entry.start}, "
                f"where {position} is due; download it again"
            )
        position = entry.end
