"""What tables and sidecars say of pictures: JSON lines, CSV, parquet, and the JSON that img2dataset writes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import pyarrow as pa

from sdxl_cli.data.buckets import Size
from sdxl_cli.data.storage import Storage, cells
from sdxl_cli.errors import FileError, UsageError, unknown

Problem = Literal["not_listed", "caption_unreadable", "shard_broken", "shard_truncated", "no_picture"]
"""Why a picture is left out before it is opened."""

PROBLEMS: dict[str, str] = {
    "not_listed": "the folder's metadata table does not name it",
    "caption_unreadable": "its caption file is not text in UTF-8, or its JSON is broken",
    "shard_broken": "the tar or parquet file cannot be read at all",
    "shard_truncated": "the tar ends too early; the members before the end are used",
    "no_picture": "the table or the tar has a row for it, but no picture (a failed download)",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One picture as its source describes it; nothing is known of the file yet."""

    path: str
    """Relative to the root, with forward slashes; see :mod:`sdxl_cli.data.storage`."""
    captions: tuple[str, ...] = ()
    aesthetic_score: float | None = None
    original_size: Size | None = None
    """(height, width) before somebody else resized the file, when the source says so."""
    problem: Problem | None = None
    repeats: int = 1
    """How often an epoch shows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The names that a table has for things; those not given are found by their usual names."""

    file: str | None = None
    """Of the picture's file, relative to the table."""
    image: str | None = None
    """Of the picture itself, as bytes; parquet only."""
    caption: str | None = None
    """Text, or a list of texts."""
    aesthetic_score: str | None = None
    original_width: str | None = None
    original_height: str | None = None


USUAL: dict[str, tuple[str, ...]] = {
    "file": ("file_name", "filename", "file", "image_path", "file_path", "path"),
    "image": ("image", "img", "jpg", "image_bytes", "bytes"),
    "caption": ("texts", "captions", "text", "caption", "TEXT", "prompt"),
    "aesthetic_score": ("aesthetic_score", "aesthetic", "AESTHETIC_SCORE", "aesthetics_score", "aesthetics"),
    "original_width": ("original_width", "ORIGINAL_WIDTH"),
    "original_height": ("original_height", "ORIGINAL_HEIGHT"),
}
"""Names that data sets use; the first one that is there is taken."""

ROLES = tuple(field.name for field in fields(Columns))


class Reader:
    """Finds values in rows of one table."""

    def __init__(self, columns: Columns, where: str, names: Sequence[str] | None) -> None:
        """Args:
            columns: names that were given.
            where: the table, for errors.
            names: of all columns; None when rows may differ (JSON lines).

        Raises:
            UsageError: a given name is not among them.
        """
        self._where, self._given = where, columns
        self._names: dict[str, tuple[str, ...]] = {}
        for role in ROLES:
            given = getattr(columns, role)
            if given is not None and names is not None and given not in names:
                raise UsageError(f"{where}: {unknown(f'column for {role}', given, names)}")
            self._names[role] = (given,) if given is not None else USUAL[role]

    def column(self, role: str, names: Sequence[str]) -> str | None:
        """The column for a role among ``names``."""
        return next((name for name in self._names[role] if name in names), None)

    def value(self, row: Mapping[str, Any], role: str) -> tuple[str, Any]:
        """Name and value; ``("", None)`` when the row has none."""
        return next(((n, row[n]) for n in self._names[role] if row.get(n) is not None), ("", None))

    def item(self, row: Mapping[str, Any], path: str, line: object) -> Item:
        """What a row says of the picture at ``path``.

        Raises:
            FileError: a value is not of its kind.
        """
        where = f"{self._where}: {line}"
        sides = (self._number(row, role, where) for role in ("original_height", "original_width"))
        height, width = sides
        size = (int(height), int(width)) if height and width else None
        return Item(path, self._captions(row, where), self._number(row, "aesthetic_score", where), size)

    def _captions(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
        name, value = self.value(row, "caption")
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in values):
            raise FileError(f"{where}: {name} is not text")
        return tuple(text for item in values if (text := item.strip()))

    def _number(self, row: Mapping[str, Any], role: str, where: str) -> float | None:
        name, value = self.value(row, role)
        if value is None or value == "":
            return None
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise FileError(f"{where}: {name} is {value!r}, not a number") from error


def table_items(storage: Storage, table: str, columns: Columns) -> Iterator[Item]:
    """What a table says, row by row; file names in it are relative to its folder.

    Raises:
        FileError: the table cannot be read, or a row names no picture.
        UsageError: a column that was given is not there.
    """
    if table.endswith(".parquet"):
        yield from parquet_items(storage, table, columns)
        return
    names = None if table.endswith(".jsonl") else _csv_header(storage, table)
    reader = Reader(columns, table, names)
    for number, row in _lines(storage, table):
        _, name = reader.value(row, "file")
        if not name or not isinstance(name, str):
            raise FileError(
                f"{table}: line {number} has no {columns.file or 'file_name'}; every row names its picture"
            )
        yield reader.item(row, beside(table, name), f"line {number}")


def beside(table: str, name: str) -> str:
    """``name``, relative to the folder of ``table``, relative to the root."""
    folder = table.rpartition("/")[0]
    return f"{folder}/{name}" if folder and not name.startswith("/") else name


def holds_pictures(storage: Storage, name: str, columns: Columns) -> bool:
    """Whether a parquet file has the pictures themselves in a column."""
    schema = storage.parquet(name).schema_arrow
    reader = Reader(columns, name, None)
    column = reader.column("image", schema.names)
    return column is not None and cells(schema.field(column).type)


def parquet_items(storage: Storage, name: str, columns: Columns) -> Iterator[Item]:
    """Rows of a parquet file, which has the pictures in a column or names their files.

    Raises:
        FileError, UsageError: see :func:`table_items`.
    """
    file = storage.parquet(name)
    schema = file.schema_arrow
    reader = Reader(columns, name, schema.names)
    image, path = reader.column("image", schema.names), reader.column("file", schema.names)
    if image is not None and not cells(schema.field(image).type):
        image, path = None, path or image  # a column "image" may have names of files
    if image is None and path is None:
        raise FileError(f"{name} has no column of pictures or file names among {', '.join(schema.names)}; "
                        "give --column file=NAME or image=NAME")  # fmt: skip
    wanted = [n for role in ROLES if role != "image" and (n := reader.column(role, schema.names))]
    read = list(dict.fromkeys([*wanted, *([path] if path else [])]))
    number = 0
    try:
        for batch in file.iter_batches(columns=read):
            # a batch without columns still has its number of rows
            rows = batch.to_pylist() if read else [{}] * batch.num_rows
            for row in rows:
                yield _parquet_item(reader, name, row, number, image, path)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"{name}: {error}") from error


def _parquet_item(
    reader: Reader, name: str, row: Mapping[str, Any], number: int, image: str | None, path: str | None
) -> Item:
    if image is not None:
        return reader.item(row, f"{name}/{image}/{number}", f"row {number}")
    assert path
    if not isinstance(row[path], str) or not row[path]:
        raise FileError(f"{name}: row {number} has no {path}; every row names its picture")
    return reader.item(row, beside(name, row[path]), f"row {number}")


def _text(storage: Storage, table: str) -> str:
    try:
        return storage.files.read(table).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{table} cannot be read: {error}") from error


def _csv_header(storage: Storage, table: str) -> list[str]:
    return list(csv.DictReader(io.StringIO(_text(storage, table), newline="")).fieldnames or ())


def _lines(storage: Storage, table: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and values of every row of a JSONL or CSV table."""
    text = io.StringIO(_text(storage, table), newline="")
    try:
        if table.endswith(".csv"):
            yield from enumerate(csv.DictReader(text), 2)
            return
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise FileError(f"{table}: line {number} is not a JSON object")
            yield number, row
    except json.JSONDecodeError as error:
        raise FileError(f"{table}: a line is not JSON: {error}") from error
    except csv.Error as error:
        raise FileError(f"{table} cannot be read: {error}") from error
