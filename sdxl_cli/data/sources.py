"""Where pictures and what is said about them come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from sdxl_cli.data.storage import Root, Storage, is_url, open_storage
from sdxl_cli.data.tables import Columns, Item, Reader, holds_pictures, parquet_items, table_items
from sdxl_cli.errors import FileError

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".mpo")
)
"""Files that are looked at in a folder; what they really are is decided by their content."""

SIDECARS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLE_KINDS = (".jsonl", ".csv", ".parquet")
DESCRIPTION = ".json"
"""What img2dataset writes beside every picture: caption, original size and more."""


@dataclass(frozen=True, slots=True)
class Found:
    """Every picture of a source."""

    root: Root
    """What the items' paths start from."""
    items: list[Item]
    notes: tuple[str, ...] = ()
    """What was seen and not used, in sentences."""
    settings: tuple[str, ...] = ()
    """What the source says about buckets and crops, as ``--set`` texts."""


def find(source: Root, columns: Columns | None = None) -> Found:
    """Every picture of a folder, a table, a tar, or a kohya dataset file.

    A folder with ``metadata.jsonl``, ``.csv`` or ``.parquet`` is described by it, with everything below; folders
    below that have a table of their own are data sets of their own and are left out. Otherwise captions are in
    ``NAME.txt`` or ``NAME.caption`` beside a picture, one a line, tars are read as WebDataset shards, and parquet
    files with pictures in a column are read row by row.

    Args:
        source: a folder or file on disk, or a URL of one.
        columns: names of columns in tables.

    Raises:
        FileError: nothing is there, or it cannot be read.
        UsageError: a column that was given is not there.
    """
    columns = columns or Columns()
    if not is_url(source) and not Path(source).is_dir():
        path = Path(source)
        if not path.is_file():
            raise FileError(f"{path} is not a folder; give the folder that holds the pictures")
        if path.suffix == ".toml":
            from sdxl_cli.data.kohya import find_subsets

            return find_subsets(path)
        return _checked(path, path.parent, list(_file_items(open_storage(path.parent), path.name, columns)))
    if is_url(source) and str(source).endswith((*TABLE_KINDS, ".tar")):
        folder, _, name = str(source).rpartition("/")
        return _checked(source, folder, list(_file_items(open_storage(folder), name, columns)))
    walk = _Walk(open_storage(source), columns)
    try:
        items = list(walk.all())
    except OSError as error:
        raise FileError(f"{source} cannot be read: {error}") from error
    return _checked(source, source, items, tuple(walk.notes))


def _checked(source: Root, root: Root, items: list[Item], notes: tuple[str, ...] = ()) -> Found:
    if not items:
        raise FileError(f"{source} holds no pictures ({', '.join(sorted(SUFFIXES))}, .tar, .parquet)")
    return Found(Path(root) if not is_url(root) else root, items, notes)


def _file_items(storage: Storage, name: str, columns: Columns) -> Iterator[Item]:
    if name.endswith(".tar"):
        return tar_items(storage, name, columns)
    if name.endswith(TABLE_KINDS):
        return table_items(storage, name, columns)
    raise FileError(f"{name} is neither a folder nor one of {', '.join((*TABLE_KINDS, '.tar', '.toml'))}")


class _Walk:
    """Goes through a folder."""

    def __init__(self, storage: Storage, columns: Columns) -> None:
        self.storage, self.columns = storage, columns
        self.notes: list[str] = []

    def all(self) -> Iterator[Item]:
        """Everything below the root."""
        return self._folder("", top=True)

    def _folder(self, folder: str, *, top: bool = False) -> Iterator[Item]:
        entries = [e for e in self.storage.files.entries(folder) if not e.name.startswith(".")]
        names = [e.name for e in entries if not e.is_folder]
        table = next((name for name in TABLES if name in names), None)
        if table is not None:
            yield from self._listed(_join(folder, table))
            return
        describe = _Sidecars(self.storage, folder, names, self.columns)
        for entry in entries:
            path = _join(folder, entry.name)
            if entry.is_folder:
                yield from self._folder(path)
            elif entry.name.endswith(".tar"):
                yield from tar_items(self.storage, path, self.columns)
            elif entry.name.endswith(".parquet"):
                yield from self._parquet(path)
            elif _suffix(entry.name) in SUFFIXES:
                yield describe(entry.name)

    def _parquet(self, path: str) -> Iterator[Item]:
        """Rows that have pictures; a table of something else is left alone, and said so."""
        try:
            if holds_pictures(self.storage, path, self.columns):
                yield from parquet_items(self.storage, path, self.columns)
            elif not self.storage.files.is_file(f"{path.removesuffix('.parquet')}.tar"):
                self.notes.append(
                    f"not read: {path} has no column of pictures; give it itself to use it as a table"
                )
        except FileError:
            yield Item(path, problem="shard_broken")

    def _listed(self, table: str) -> Iterator[Item]:
        """The table's rows in order, then the pictures that it does not name."""
        listed = set()
        for item in table_items(self.storage, table, self.columns):
            listed.add(item.path)
            yield item
        for path in self._unlisted(table.rpartition("/")[0]):
            if path not in listed:
                yield Item(path, problem="not_listed")

    def _unlisted(self, folder: str, *, top: bool = True) -> Iterator[str]:
        entries = [e for e in self.storage.files.entries(folder) if not e.name.startswith(".")]
        if not top and any(e.name in TABLES for e in entries):
            self.notes.append(f"left out, because it is a data set of its own: {folder}")
            return
        for entry in entries:
            path = _join(folder, entry.name)
            if entry.is_folder:
                yield from self._unlisted(path, top=False)
            elif _suffix(entry.name) in SUFFIXES:
                yield path


class _Sidecars:
    """Pictures of one folder with what lies beside them."""

    def __init__(self, storage: Storage, folder: str, names: Sequence[str], columns: Columns) -> None:
        self.storage, self.folder, self.names = storage, folder, frozenset(names)
        self.reader = Reader(columns, folder or "sidecar", None)

    def __call__(self, name: str) -> Item:
        stem = name.removesuffix(PurePosixPath(name).suffix)
        return described(_join(self.folder, name), self._read, stem, self.reader)

    def _read(self, name: str) -> bytes | None:
        return self.storage.files.read(_join(self.folder, name)) if name in self.names else None


def described(path: str, read: Callable[[str], bytes | None], stem: str, reader: Reader) -> Item:
    """A picture with its captions and, when img2dataset was there, its original size.

    Args:
        path: of the picture.
        read: the content of a file beside it, None when there is none.
        stem: the picture's name without its ending.
        reader: for the JSON.
    """
    try:
        data = read(stem + DESCRIPTION)
        row = json.loads(data) if data is not None else {}
        item = reader.item(row if isinstance(row, dict) else {}, path, stem + DESCRIPTION)
        for suffix in SIDECARS:
            text = read(stem + suffix)
            if text is not None:
                lines = text.decode("utf-8-sig").splitlines()
                return replace(item, captions=tuple(clean for line in lines if (clean := line.strip())))
    except (UnicodeDecodeError, OSError, json.JSONDecodeError, FileError):
        return Item(path, problem="caption_unreadable")
    return item


def tar_items(storage: Storage, tar: str, columns: Columns) -> Iterator[Item]:
    """Samples of a WebDataset shard: members that share a name up to the first dot of their last part.

    https://github.com/webdataset/webdataset and what img2dataset writes: ``000000001.jpg``, ``.txt``, ``.json``.
    """
    try:
        index = storage.tar(tar)
    except FileError:
        yield Item(tar, problem="shard_broken")
        return
    groups: dict[str, list[str]] = {}
    for name in index.members:
        folder, slash, last = name.rpartition("/")
        groups.setdefault(folder + slash + last.partition(".")[0], []).append(name)
    reader = Reader(columns, tar, None)

    def read(name: str) -> bytes | None:
        if name not in index.members:
            return None
        start, size = index.members[name]
        return storage.files.read_range(tar, start, size)

    for stem, names in groups.items():
        picture = next((name for name in names if _suffix(name) in SUFFIXES), None)
        if picture is not None:
            yield described(f"{tar}/{picture}", read, stem, reader)
        elif any(name.endswith((DESCRIPTION, *SIDECARS)) for name in names):
            yield replace(described(f"{tar}/{stem}", read, stem, reader), problem="no_picture")
    if not index.complete:
        yield Item(tar, problem="shard_truncated")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
