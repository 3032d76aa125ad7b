"""Tensors in files, read when asked for and not copied when it can be helped."""

from __future__ import annotations

import math
import mmap
import platform
import sys
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sdxl_cli.checkpoint.header import ITEM_SIZE, Entry, read_header
from sdxl_cli.checkpoint.layouts import Plan, Source
from sdxl_cli.errors import FileError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's dtype names."""

_CHUNK = 1 << 20
"""Bytes read at a time for a cast; a multiple of every item's size."""

assert DTYPES.keys() == ITEM_SIZE.keys()


class Tensors(Protocol):
    """Named tensors somewhere on disk."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the bytes on disk."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Every tensor's dtype, as safetensors writes it."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's own notes."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, on the CPU. ``dtype`` casts floating-point tensors and leaves others alone."""


class TensorFile:
    """One safetensors file, mapped into memory.

    What ``read`` returns without a cast is the file's own pages: it costs no memory of its own until written to,
    and writing never reaches the file. Such tensors keep the mapping alive; this object may go.
    """

    def __init__(self, path: Path | str) -> None:
        """Read the table of contents.

        Raises:
            FileError: see :func:`sdxl_cli.checkpoint.header.read_header`; or a dtype torch does not have.
        """
        self.path = Path(path)
        self._header = read_header(self.path)
        self._map: mmap.mmap | None = None
        for name, entry in self._header.entries.items():
            if entry.dtype not in DTYPES:
                raise FileError(
                    f"{self.path}: {name} has dtype {entry.dtype}, which this program does not read"
                )
        self.shapes = self._header.shapes
        self.dtypes = self._header.dtypes
        self.metadata = dict(self._header.metadata)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`Tensors.read`.

        Raises:
            FileError: there is no such tensor, or the file changed or became unreadable since it was opened.
        """
        entry = self._header.entries.get(name)
        if entry is None:
            raise FileError(f"{self.path} has no tensor {name}")
        stored = DTYPES[entry.dtype]
        if math.prod(entry.shape) == 0:
            return torch.empty(entry.shape, dtype=dtype if dtype and stored.is_floating_point else stored)
        if dtype is None or dtype == stored or not stored.is_floating_point:
            # some writers do not align; torch kernels expect it
            return self._mapped(entry) if entry.start % stored.itemsize == 0 else self._copied(entry, stored)
        return self._copied(entry, dtype)

    def _mapped(self, entry: Entry) -> Tensor:
        if self._map is None:
            self._map = _private_map(self.path)
        stored = DTYPES[entry.dtype]
        flat = torch.frombuffer(self._map, dtype=stored, count=math.prod(entry.shape), offset=entry.start)
        return flat.reshape(entry.shape)

    def _copied(self, entry: Entry, dtype: torch.dtype) -> Tensor:
        """Read into memory of its own, through a buffer that stays in the processor's cache.

        For a cast, two to three times faster than through the mapping, and the stored bytes do not stay resident.
        """
        stored = DTYPES[entry.dtype]
        size = entry.end - entry.start
        result = torch.empty(math.prod(entry.shape), dtype=dtype)
        buffer = torch.empty(min(size, _CHUNK), dtype=torch.uint8)
        values, view = buffer.view(stored), memoryview(buffer.numpy())  # type: ignore[arg-type]
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                for start in range(0, size, _CHUNK):
                    length = min(_CHUNK, size - start)
                    self._fill(file, view[:length])
                    first, count = start // stored.itemsize, length // stored.itemsize
                    result[first : first + count] = values[:count]
        except OSError as error:
            raise FileError(f"{self.path} cannot be read: {error.strerror}") from error
        return result.reshape(entry.shape)

    def _fill(self, file: FileIO, view: memoryview) -> None:
        while view:
            count = file.readinto(view)
            if not count:
                raise FileError(f"{self.path} became shorter while it was read")
            view = view[count:]


class StreamedFile(TensorFile):
    """A file that is read once from end to end: every tensor is memory of its own, and no page of the file stays."""

    def _mapped(self, entry: Entry) -> Tensor:
        return self._copied(entry, DTYPES[entry.dtype])


class Joined:
    """Several files as one: shards, or the components of a folder. A name in two of them is the last one's."""

    def __init__(self, members: Sequence[Tensors]) -> None:
        """``metadata`` is that of all members, the first one's where they differ."""
        self._home = {name: member for member in members for name in member.shapes}
        self.shapes = {name: member.shapes[name] for name, member in self._home.items()}
        self.dtypes = {name: member.dtypes[name] for name, member in self._home.items()}
        self.metadata = {key: value for member in reversed(members) for key, value in member.metadata.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`Tensors.read`. ``name`` must be one of :attr:`shapes`."""
        return self._home[name].read(name, dtype)


class Renamed:
    """Tensors under the names, and in the shapes, of another layout."""

    def __init__(self, tensors: Tensors, plan: Plan) -> None:
        """``plan`` says what each new name is made of; tensors it does not mention are left out."""
        self._tensors = tensors
        self._plan = plan
        self.shapes = {name: source.shape(tensors.shapes) for name, source in plan.items()}
        self.dtypes = {name: tensors.dtypes[source.keys[0]] for name, source in plan.items()}
        self.metadata = dict(tensors.metadata)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`Tensors.read`. Joined and transposed tensors are copies."""
        source = self._plan[name]
        return changed(source, [self._tensors.read(key, dtype) for key in source.keys]).reshape(
            self.shapes[name]
        )


def changed(source: Source, tensors: list[Tensor]) -> Tensor:
    """The tensor of the target layout from those it is made of, up to dimensions of one."""
    match source.change:
        case "transpose":
            return tensors[0].T.contiguous()
        case "join":
            return torch.cat(tensors)
        case "split":
            return tensors[0].chunk(3)[source.part]
        case "same" | "squeeze" | "unsqueeze":
            return tensors[0]


def _private_map(path: Path) -> mmap.mmap:
    """The whole file, copy-on-write."""
    try:
        with path.open("rb") as file:
            if hasattr(mmap, "MAP_PRIVATE"):
                # without MAP_NORESERVE Linux counts the file as memory it may have to provide, and refuses big ones
                flags = mmap.MAP_PRIVATE | _map_noreserve()
                return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be mapped into memory: {error}") from error


def _map_noreserve() -> int:
    """Python names the flag from 3.13 on; its value is the machine's."""
    linux = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return int(getattr(mmap, "MAP_NORESERVE", 0x4000 if linux else 0))
