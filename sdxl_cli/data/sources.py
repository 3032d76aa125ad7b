"""Where pictures and what is said about them come from."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdxl_cli.data.buckets import Size
from sdxl_cli.errors import FileError

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".mpo")
)
"""Files that are looked at in a folder; what they really are is decided by their content."""

SIDECARS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv")

Problem = Literal["not_listed", "caption_unreadable"]
"""Why a picture is left out before it is opened."""

PROBLEMS: dict[str, str] = {
    "not_listed": "the folder's metadata table does not name it",
    "caption_unreadable": "its caption file is not text in UTF-8",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One picture as its source describes it; nothing is known of the file yet."""

    path: str
    """Relative to the root, with forward slashes."""
    captions: tuple[str, ...] = ()
    aesthetic_score: float | None = None
    original_size: Size | None = None
    """(height, width) before somebody else resized the file, when the source says so."""
    problem: Problem | None = None


def find_items(root: Path) -> list[Item]:
    """Every picture below ``root``, in the order of the table, or by name when there is none.

    A folder with ``metadata.jsonl`` or ``metadata.csv`` is described by it, with everything below; folders
    below that have a table of their own are data sets of their own and are left out. Without a table,
    captions are in ``NAME.txt`` or ``NAME.caption`` beside the picture, one a line.

    Raises:
        FileError: the folder is missing, holds no pictures, or its table cannot be read.
    """
    if not root.is_dir():
        raise FileError(f"{root} is not a folder; give the folder that holds the pictures")
    table = next((root / name for name in TABLES if (root / name).is_file()), None)
    items = list(_listed(root, table) if table else _walked(root, root))
    if not items:
        raise FileError(f"{root} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return items


def own_tables(root: Path) -> list[str]:
    """Folders below a root with a table that have one themselves, and so are left out of it."""
    if not any((root / name).is_file() for name in TABLES):
        return []
    found = {path.parent for name in TABLES for path in root.rglob(name)} - {root}
    return sorted(path.relative_to(root).as_posix() for path in found)


def _walked(folder: Path, root: Path) -> Iterator[Item]:
    """Pictures with sidecars, sorted; a subfolder with a table is read by its table."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            table = next((path / name for name in TABLES if (path / name).is_file()), None)
            yield from _listed(root, table) if table else _walked(path, root)
        elif path.suffix.lower() in SUFFIXES:
            yield _with_sidecar(path, root)


def _with_sidecar(path: Path, root: Path) -> Item:
    name = path.relative_to(root).as_posix()
    for suffix in SIDECARS:
        sidecar = path.with_suffix(suffix)
        if not sidecar.is_file():
            continue
        try:
            lines = sidecar.read_text(encoding="utf-8-sig").splitlines()
        except (UnicodeDecodeError, OSError):
            return Item(name, problem="caption_unreadable")
        return Item(name, tuple(text for line in lines if (text := line.strip())))
    return Item(name)


def _listed(root: Path, table: Path) -> Iterator[Item]:
    """The table's rows in order, then the pictures that it does not name."""
    prefix = table.parent.relative_to(root)
    listed = set()
    for number, row in _rows(table):
        where = f"{table}: line {number}"
        name = row.get("file_name")
        if not name or not isinstance(name, str):
            raise FileError(f"{where} has no file_name; every row names its picture")
        path = (prefix / name).as_posix()
        listed.add(path)
        yield Item(path, _captions(row, where), _number(row, "aesthetic_score", where), _original(row, where))
    for item in _unlisted(table.parent, root):
        if item not in listed:
            yield Item(item, problem="not_listed")


def _unlisted(folder: Path, root: Path) -> Iterator[str]:
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not any((path / name).is_file() for name in TABLES):
                yield from _unlisted(path, root)
        elif path.suffix.lower() in SUFFIXES:
            yield path.relative_to(root).as_posix()


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and values of every row of a JSONL or CSV table."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                yield from enumerate(csv.DictReader(file), 2)
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise FileError(f"{table}: line {number} is not a JSON object")
                yield number, row
    except json.JSONDecodeError as error:
        raise FileError(f"{table}: a line is not JSON: {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{table} cannot be read: {error}") from error


def _captions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """``texts`` or ``captions`` (lists), else ``text`` or ``caption`` (one)."""
    for key in ("texts", "captions", "text", "caption"):
        value = row.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in values):
            raise FileError(f"{where}: {key} is not text")
        return tuple(text for item in values if (text := item.strip()))
    return ()


def _original(row: Mapping[str, Any], where: str) -> Size | None:
    height, width = (_number(row, key, where) for key in ("original_height", "original_width"))
    if not height or not width:
        return None
    return int(height), int(width)


def _number(row: Mapping[str, Any], key: str, where: str) -> float | None:
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise FileError(f"{where}: {key} is {value!r}, not a number") from error
