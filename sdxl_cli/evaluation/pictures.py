"""Sets of pictures, and how they are brought to one size before they are measured."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from sdxl_cli.data.geometry import plan_crop
from sdxl_cli.data.hygiene import Hygiene, Refused, open_picture
from sdxl_cli.data.sources import find
from sdxl_cli.data.storage import Storage, open_storage
from sdxl_cli.data.tables import PROBLEMS, Item
from sdxl_cli.errors import FileError, SdxlError
from sdxl_cli.generation.metadata import parse_record
from sdxl_cli.generation.picture import read_texts

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Filter = Literal["bicubic", "lanczos", "bilinear", "box"]
FILTERS: tuple[Filter, ...] = get_args(Filter)
_FILTERS = {name: Image.Resampling[name.upper()] for name in FILTERS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """How every picture is brought to one size."""

    size: int = 0
    """Side in pixels of the square: the short side is resized to it and the middle is cut out. 0 leaves pictures as
    they are."""
    filter: Filter = "bicubic"
    """Of Pillow, which antialiases when it shrinks."""

    def settings(self) -> dict[str, Any]:
        """For the record."""
        return {"size": self.size, "filter": self.filter if self.size else None}

    def apply(self, image: Image.Image) -> Pixels:
        """[H, W, 3], uint8."""
        if not self.size:
            return np.array(image)
        square = (self.size, self.size)
        plan = plan_crop((image.height, image.width), square, "center", random.Random(0))
        height, width = plan.resized_size
        if image.size != (width, height):
            image = image.resize((width, height), _FILTERS[self.filter])
        top, left = plan.crop_top_left
        return np.array(image.crop((left, top, left + self.size, top + self.size)))


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures of a folder, a table, a tar or a parquet file."""

    source: Path
    items: Sequence[Item]
    found: int
    """How many the source has; ``items`` may be fewer."""
    framing: Framing
    storage: Storage
    problems: dict[int, str] = field(default_factory=dict)
    """Number of a picture -> why it could not be used; filled while they are loaded."""

    def __len__(self) -> int:
        return len(self.items)

    def load(self, rows: Sequence[int]) -> list[Pixels | None]:
        """Pictures by number, framed; None for those that cannot be used."""
        with ThreadPoolExecutor(min(len(rows), os.cpu_count() or 1)) as pool:
            return list(pool.map(self._load, rows))

    def _load(self, row: int) -> Pixels | None:
        item = self.items[row]
        try:
            if item.problem is not None:
                raise FileError(PROBLEMS[item.problem])
            data = self.storage.read(item.path)
            return self.framing.apply(open_picture(data, Hygiene(), suffix=Path(item.path).suffix).image)
        except (Refused, FileError, OSError) as error:
            self.problems[row] = f"{item.path}: {error}"
            return None

    def require_some(self, unusable: Sequence[int]) -> None:
        """Note the pictures that could not be used, in this run or an earlier one.

        Raises:
            FileError: these are all there are.
        """
        for row in unusable:
            self.problems.setdefault(row, f"{self.items[row].path}: could not be used when it was its turn")
        if len(unusable) == len(self):
            raise FileError(
                f"{self.source}: none of its {len(self)} pictures can be used; {self.unusable()[0]}"
            )

    def unusable(self) -> list[str]:
        """Which pictures were left out, and why."""
        return [self.problems[row] for row in sorted(self.problems)]

    def captions(self) -> list[str] | None:
        """What every picture shows: its caption, else the prompt it was made with; None when one has neither."""
        texts = [item.captions[0] if item.captions else self._prompt(item) for item in self.items]
        return None if None in texts else [text for text in texts if text is not None]

    def _prompt(self, item: Item) -> str | None:
        path = self.source / item.path
        try:
            texts = read_texts(path)
            return parse_record(texts.record, path).request.prompt if texts.record else None
        except SdxlError:
            return None

    def settings(self) -> dict[str, Any]:
        """What decides about the numbers, for the record."""
        return {
            "pictures": str(self.source.resolve()),
            "files_sha256": self._files_sha256,
            **self.framing.settings(),
        }

    @cached_property
    def _files_sha256(self) -> str:
        """Of the names, sizes and times of change, as they are when the run begins: pictures that were drawn anew
        under their old names are other pictures.
        """
        lines = (f"{item.path}\t{self.storage.stamp(item.path)}\n" for item in self.items)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_pictures(source: Path, framing: Framing, limit: int = 0) -> Pictures:
    """The pictures of a source, in the order of their names.

    Args:
        source: see :func:`sdxl_cli.data.sources.find`.
        framing: what is done to each.
        limit: at most so many, evenly spread; 0 for all.

    Raises:
        FileError: there are none.
    """
    if not source.exists():
        raise FileError(f"{source}: no such file or folder")
    found = find(source)
    items = found.items
    if limit and limit < len(items):
        items = [items[index * len(items) // limit] for index in range(limit)]
    root = found.root
    return Pictures(
        source=Path(root), items=items, found=len(found.items), framing=framing, storage=open_storage(root)
    )


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: lines of text, COCO's captions (the first of every picture), or a table's column.

    Args:
        path: ``.txt``; ``.json``: COCO's, or a list of texts; ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` with a
            column ``prompt``, ``caption`` or ``text``; or pictures with captions, see :func:`open_pictures`.

    Raises:
        FileError: it cannot be read, or has none.
    """
    try:
        texts = _READERS[path.suffix.lower()](path) if path.suffix.lower() in _READERS else _of_pictures(path)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: no prompts can be read from it ({error})") from error
    found = [text.strip() for text in texts if text and text.strip()]
    if not found:
        raise FileError(f"{path}: has no prompts")
    return found


def _of_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _of_json(path: Path) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, list):
        return [str(text) if not isinstance(text, dict) else _field(text) for text in content]
    first: dict[int, str] = {}
    for annotation in sorted(content["annotations"], key=lambda entry: entry["id"]):
        first.setdefault(annotation["image_id"], annotation["caption"])
    return [first[image] for image in sorted(first)]


def _of_json_lines(path: Path) -> list[str]:
    return [_field(json.loads(line)) for line in _of_lines(path) if line.strip()]


def _of_table(path: Path) -> list[str]:
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        return [_field(row) for row in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")]


def _of_parquet(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    name = next(column for column in table.column_names if column.lower() in _FIELDS)
    return [str(value) for value in table[name].to_pylist()]


def _of_pictures(path: Path) -> list[str]:
    captions = open_pictures(path, Framing()).captions()
    if captions is None:
        raise FileError(f"{path}: not every picture has a caption; give the prompts with --prompts FILE")
    return captions


_FIELDS = ("prompt", "caption", "text")
_READERS = {
    ".txt": _of_lines,
    ".json": _of_json,
    ".jsonl": _of_json_lines,
    ".csv": _of_table,
    ".tsv": _of_table,
    ".parquet": _of_parquet,
}


def _field(row: dict[str, Any]) -> str:
    for name, value in row.items():
        if name.lower() in _FIELDS and value:
            return str(value)
    raise KeyError(f"no column {', '.join(_FIELDS)}")
