"""Bytes by name: plain files, members of tars and cells of parquet files, on disk or behind a URL.

A name is relative to a root and has forward slashes. ``a.tar/x.jpg`` is a member of a tar, ``a.parquet/image/12`` the
value of column ``image`` in row 12. Tars and parquet files are indexed once and then read in place.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_cli.data.hygiene import Refused
from sdxl_cli.errors import FileError, UsageError

Root = Path | str
"""A folder on disk, or a URL that fsspec knows (``s3://…``, ``gs://…``, ``memory://…``)."""

CONTAINERS = (".tar", ".parquet")
_ROW_GROUPS = 4
"""Row groups of parquet images kept in memory; scanning and encoding go through them in order."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in a folder."""

    name: str
    is_folder: bool


class Files(Protocol):
    """What is needed of a file system."""

    def entries(self, folder: str) -> list[Entry]:
        """What is in a folder, sorted by name; ``""`` is the root."""
        ...

    def is_file(self, name: str) -> bool:
        """Whether a plain file of that name is there."""
        ...

    def read(self, name: str) -> bytes:
        """A file's content. Raises OSError."""
        ...

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on; fewer at the end of the file. Raises OSError."""
        ...

    def open(self, name: str) -> BinaryIO:
        """The file, for reading and seeking. Raises OSError."""
        ...


class LocalFiles:
    """A folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self, folder: str) -> list[Entry]:
        """See :meth:`Files.entries`."""
        with os.scandir(self.root / folder) as found:
            return sorted((Entry(e.name, e.is_dir()) for e in found), key=lambda e: e.name)

    def is_file(self, name: str) -> bool:
        """See :meth:`Files.is_file`."""
        return (self.root / name).is_file()

    def read(self, name: str) -> bytes:
        """See :meth:`Files.read`. A pipe or device is refused: reading it might never end."""
        path = self.root / name
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise OSError(0, "not a plain file")
        return path.read_bytes()

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """See :meth:`Files.read_range`."""
        with (self.root / name).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def open(self, name: str) -> BinaryIO:
        """See :meth:`Files.open`."""
        return (self.root / name).open("rb")


class RemoteFiles:
    """A folder behind a URL, through fsspec."""

    def __init__(self, root: str) -> None:
        """Raises UsageError: nothing installed knows the URL's protocol."""
        import fsspec

        try:
            self._system, base = fsspec.core.url_to_fs(root)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{root}: {error}; give a folder, or install what reads such URLs") from error
        self._base = str(base).rstrip("/")

    def _full(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    def entries(self, folder: str) -> list[Entry]:
        """See :meth:`Files.entries`."""
        found = self._system.ls(self._full(folder), detail=True)
        named = (Entry(e["name"].rstrip("/").rsplit("/", 1)[-1], e["type"] == "directory") for e in found)
        return sorted(named, key=lambda e: e.name)

    def is_file(self, name: str) -> bool:
        """See :meth:`Files.is_file`."""
        return bool(self._system.isfile(self._full(name)))

    def read(self, name: str) -> bytes:
        """See :meth:`Files.read`."""
        return bytes(self._system.cat_file(self._full(name)))

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """See :meth:`Files.read_range`."""
        return bytes(self._system.cat_file(self._full(name), start=start, end=start + size))

    def open(self, name: str) -> BinaryIO:
        """See :meth:`Files.open`."""
        return self._system.open(self._full(name), "rb")


def is_url(root: Root) -> bool:
    """Whether fsspec is asked, rather than the disk."""
    return isinstance(root, str) and "://" in root


@lru_cache(maxsize=64)
def open_storage(root: Root) -> Storage:
    """The storage of a root; the same one for the same root, so that its indices are built once a process."""
    return Storage(RemoteFiles(str(root)) if is_url(root) else LocalFiles(Path(root)))


@dataclass(frozen=True, slots=True)
class TarIndex:
    """Where the members of a tar are."""

    members: dict[str, tuple[int, int]]
    """Name -> first byte and length, in the order of the file."""
    complete: bool
    """False when the tar ends too early; what came before the end is listed."""


class Storage:
    """Reads by name; may be used from several threads."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._lock = threading.RLock()
        self._tars: dict[str, TarIndex] = {}
        self._parquets: dict[str, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[str, str, int], pa.ChunkedArray] = OrderedDict()

    def read(self, name: str) -> bytes:
        """The bytes of that name, at least one.

        Raises:
            Refused: missing, unreadable, empty, or cut off.
        """
        try:
            container, inner = self._split(name)
            if container is None:
                data = self.files.read(name)
            elif container.endswith(".tar"):
                data = self._member(container, inner)
            else:
                data = self._cell(container, inner)
        except FileNotFoundError as error:
            raise Refused("missing") from error
        except OSError as error:
            raise Refused("unreadable", error.strerror or str(error)) from error
        if not data:
            raise Refused("empty")
        return data

    def stamp(self, name: str) -> str:
        """Size in bytes and time of change in ns of the file that holds what a name stands for: other content has
        another stamp. Empty where there is no such file, or it is not on this machine.
        """
        if not isinstance(self.files, LocalFiles):
            return ""
        container, _ = self._split(name)
        try:
            status = (self.files.root / (container or name)).stat()
        except OSError:
            return ""
        return f"{status.st_size} {status.st_mtime_ns}"

    def tar(self, name: str) -> TarIndex:
        """The members of a tar.

        Raises:
            FileError: it is not a tar, or cannot be read.
        """
        with self._lock:
            if name not in self._tars:
                self._tars[name] = _index(self.files, name)
            return self._tars[name]

    def parquet(self, name: str) -> pq.ParquetFile:
        """A parquet file, open.

        Raises:
            FileError: it is not one, or cannot be read.
        """
        with self._lock:
            if name not in self._parquets:
                try:
                    self._parquets[name] = pq.ParquetFile(self.files.open(name))
                except (OSError, pa.ArrowException) as error:
                    raise FileError(f"{name} is not a parquet file that can be read: {error}") from error
            return self._parquets[name]

    def _split(self, name: str) -> tuple[str | None, str]:
        """The container a name goes through, if any, and the rest."""
        if not any(f"{kind}/" in name for kind in CONTAINERS):
            return None, name
        parts = name.split("/")
        for count in range(1, len(parts)):
            head = "/".join(parts[:count])
            if head.endswith(CONTAINERS) and self.files.is_file(head):
                return head, "/".join(parts[count:])
        return None, name

    def _member(self, tar: str, inner: str) -> bytes:
        try:
            start, size = self.tar(tar).members[inner]
        except (KeyError, FileError) as error:
            raise FileNotFoundError(inner) from error
        data = self.files.read_range(tar, start, size)
        if len(data) < size:
            raise Refused("truncated", "the tar ends within it")
        return data

    def _cell(self, name: str, inner: str) -> bytes:
        column, _, number = inner.rpartition("/")
        with self._lock:
            file = self.parquet(name)
            if not number.isdecimal() or int(number) >= file.metadata.num_rows:
                raise FileNotFoundError(inner)
            row, group = int(number), 0
            while row >= (count := file.metadata.row_group(group).num_rows):
                row, group = row - count, group + 1
            value = self._group(file, name, column, group)[row].as_py()
        if isinstance(value, dict):  # how the datasets library stores pictures
            value = value.get("bytes")
        return b"" if value is None else bytes(value)

    def _group(self, file: pq.ParquetFile, name: str, column: str, group: int) -> pa.ChunkedArray:
        key = (name, column, group)
        if key not in self._groups:
            try:
                self._groups[key] = file.read_row_group(group, columns=[column]).column(0)
            except (pa.ArrowException, IndexError) as error:
                raise OSError(0, f"row group {group} of {name}: {error}") from error
            while len(self._groups) > _ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def _index(files: Files, name: str) -> TarIndex:
    members: dict[str, tuple[int, int]] = {}
    try:
        with files.open(name) as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                try:
                    for member in tar:
                        if member.isfile():
                            members[member.name] = (member.offset_data, member.size)
                except (tarfile.ReadError, EOFError):
                    return TarIndex(members, complete=False)
    except (OSError, tarfile.TarError) as error:
        raise FileError(f"{name} is not a plain tar ({error}); unpack compressed ones") from error
    whole = all(start + length <= size for start, length in members.values())
    return TarIndex(members, complete=whole)


def cells(value: Any) -> bool:
    """Whether an arrow type holds pictures: bytes, or the struct of bytes and path of the datasets library."""
    if pa.types.is_struct(value):
        return any(value.field(i).name == "bytes" for i in range(value.num_fields))
    return pa.types.is_binary(value) or pa.types.is_large_binary(value)
