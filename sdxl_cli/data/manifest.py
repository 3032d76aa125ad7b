"""The manifest: one row for every picture that was found, with what will be shown of it or why nothing will."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_cli import presets
from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.data.buckets import BucketConfig, Size
from sdxl_cli.data.geometry import CropPlan, CropPolicy
from sdxl_cli.data.hygiene import REASONS, Hygiene
from sdxl_cli.data.storage import Root, is_url
from sdxl_cli.data.tables import PROBLEMS, Columns
from sdxl_cli.errors import FileError, UsageError

KEPT = "kept"
MERGED = "merged"
"""Noted of a picture that a neighbouring bucket took in, so that batches fill up."""

Remainder = Literal["short", "pad", "merge", "drop"]
"""What becomes of the pictures of a bucket that fill no whole batch.

short: a batch of fewer, weighing less; pad: filled with pictures of the same bucket, which then weigh less; merge: they
go to the neighbouring bucket, when the manifest is made; drop: left out, other ones every epoch.
"""

FATES: dict[str, str] = {
    KEPT: "used",
    **REASONS,
    **PROBLEMS,
    "too_small": "a side is shorter than min_side, or than one step when nothing is enlarged",
    "too_narrow": "no bucket has nearly this shape (max_aspect_error)",
    "upscaled_too_far": "filling its bucket would enlarge it more than max_upscale",
    "no_caption": "nothing is said about it, and require_captions is set",
    "duplicate": "the same bytes as an earlier picture",
}
"""Every fate of a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Everything that decides what a manifest says; kept inside it."""

    buckets: BucketConfig
    crop: CropPolicy = "random"
    """random: anywhere, by the seed; center: the middle."""
    flip: bool = False
    """Mirror half of the crops, chosen by the seed."""
    seed: int = 0
    crops_per_image: int = 1
    """Rows for every kept picture, each with a crop of its own; an epoch uses one of them."""
    max_upscale: float | None = None
    """Pictures that would have to be enlarged more than this are left out; 1 allows no enlarging."""
    max_aspect_error: float | None = None
    """Pictures whose shape is further from every bucket than this factor are left out; 2 is twice as narrow."""
    no_upscale: bool = False
    """Pictures smaller than their bucket get a bucket of their own size, sides rounded down to ``step``."""
    step: int = 64
    """Sides of such own buckets are multiples of this, in pixels; a multiple of 8."""
    min_side: int = 0
    """Pictures with a shorter side are left out. The paper's point is that they need not be."""
    require_captions: bool = False
    """Whether pictures without a caption are left out."""
    keep_duplicates: bool = False
    """Whether later pictures with the same bytes are kept."""
    batch_size: int | None = None
    """Pictures in a step over all devices; what ``merge`` fills up to, and the table of repeats is made for."""
    remainder: Remainder = "short"
    """What becomes of pictures that fill no whole batch, unless training asks otherwise."""
    check: Literal["pixels", "header"] = "pixels"
    """pixels: decode every picture; header: believe what the file's first bytes say, which finds no damage."""
    columns: Columns = field(default_factory=Columns)
    hygiene: Hygiene = field(default_factory=Hygiene)

    def __post_init__(self) -> None:
        if self.crops_per_image < 1:
            raise ValueError(f"crops_per_image is {self.crops_per_image}; it must be at least 1")
        for name in ("max_upscale", "max_aspect_error"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it is a factor of at least 1")
        if self.no_upscale and self.max_upscale is not None:
            raise ValueError(
                "no_upscale and max_upscale exclude each other; nothing would be enlarged anyway"
            )
        if self.step < 8 or self.step % 8:
            raise ValueError(f"step is {self.step}; it is a multiple of 8 pixels")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.remainder == "merge" and self.batch_size is None:
            raise ValueError("remainder = merge fills up batches; say with batch_size how large they are")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One crop of one picture, or one picture that is left out. All sizes are (height, width) in pixels."""

    path: str
    """Relative to the manifest's root."""
    fate: str = KEPT
    """``kept`` or one of ``FATES``; then only what was learnt before is filled in."""
    detail: str = ""
    """More about the fate, in words."""
    original_size: Size | None = None
    """For size conditioning: of the picture before anybody resized it."""
    stored_size: Size | None = None
    """Of the file as it is, upright."""
    scale: float | None = None
    resized_size: Size | None = None
    crop_top_left: tuple[int, int] | None = None
    target_size: Size | None = None
    """The bucket."""
    flipped: bool = False
    crop: int = 0
    """Which of the picture's crops this is, from 0."""
    captions: tuple[str, ...] = ()
    tokens_clip_l: tuple[int, ...] = ()
    """Tokens of each caption, without start and end; CLIP-L reads 75 of them."""
    tokens_big_g: tuple[int, ...] = ()
    """The same for bigG."""
    repeats: int = 1
    """How often an epoch shows it."""
    aesthetic_score: float | None = None
    sha256: str | None = None
    """Of the file's bytes, in hexadecimal."""
    orientation: int | None = None
    """EXIF orientation of the file, 1..8."""
    notes: tuple[str, ...] = ()
    """What opening it took; see :data:`sdxl_cli.data.hygiene.Note`."""

    @property
    def kept(self) -> bool:
        """Whether the model is shown this."""
        return self.fate == KEPT

    @property
    def plan(self) -> CropPlan:
        """The crop, of a kept row."""
        assert self.resized_size
        assert self.scale
        assert self.crop_top_left
        assert self.target_size
        return CropPlan(self.resized_size, self.scale, self.crop_top_left, self.target_size, self.flipped)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """What is kept beside the rows."""

    root: str
    """The folder that the rows' paths start from."""
    dataset: DatasetConfig


@dataclass(frozen=True, slots=True)
class Manifest:
    """Rows, where their pictures are, and how they came to be."""

    root: Root
    config: DatasetConfig
    rows: tuple[Row, ...]

    @property
    def kept(self) -> tuple[Row, ...]:
        """The rows that are used."""
        return tuple(row for row in self.rows if row.kept)


_SIZE = pa.list_(pa.int32(), 2)
_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("fate", pa.string()),
        ("detail", pa.string()),
        ("original_size", _SIZE),
        ("stored_size", _SIZE),
        ("scale", pa.float64()),
        ("resized_size", _SIZE),
        ("crop_top_left", _SIZE),
        ("target_size", _SIZE),
        ("flipped", pa.bool_()),
        ("crop", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("tokens_clip_l", pa.list_(pa.int32())),
        ("tokens_big_g", pa.list_(pa.int32())),
        ("repeats", pa.int32()),
        ("aesthetic_score", pa.float64()),
        ("sha256", pa.string()),
        ("orientation", pa.int8()),
        ("notes", pa.list_(pa.string())),
    ]
)
"""Columns of the parquet file; the same names and values are the keys of a JSONL line."""

_NEWER = {"tokens_clip_l", "tokens_big_g", "repeats"}
"""Columns that the first manifests did not have."""

_KEY = b"sdxl.manifest"
"""Where the parquet file's metadata has the settings."""

Format = Literal["parquet", "jsonl"]


def format_of(path: Path) -> Format:
    """What the name's ending asks for.

    Raises:
        UsageError: it is neither.
    """
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix == ".jsonl":
        return "jsonl"
    raise UsageError(f"{path}: a manifest is .parquet or .jsonl")


def write_manifest(path: Path, manifest: Manifest, *, overwrite: bool = False) -> None:
    """Write the rows as parquet or JSONL, whole or not at all, and ``NAME.toml`` with root and configuration.

    Raises:
        FileError: the file exists and ``overwrite`` is not set, or cannot be written.
        UsageError: the name ends in neither ``.parquet`` nor ``.jsonl``.
    """
    kind = format_of(path)
    root = str(manifest.root) if is_url(manifest.root) else str(Path(manifest.root).resolve())
    settings = presets.to_toml(_Settings(root=root, dataset=manifest.config))
    with atomic_write(path, overwrite=overwrite) as temporary:
        if kind == "parquet":
            table = to_table(manifest.rows)
            pq.write_table(table.replace_schema_metadata({_KEY: settings.encode()}), temporary)
        else:
            with temporary.open("w", encoding="utf-8") as file:
                for row in manifest.rows:
                    values = {name: getattr(row, name) for name in _SCHEMA.names}
                    file.write(json.dumps(values, ensure_ascii=False) + "\n")
    with atomic_write(path.with_suffix(".toml")) as temporary:
        temporary.write_text(settings, encoding="utf-8")


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Rows as an arrow table with the columns of a manifest."""
    columns = {name: [getattr(row, name) for row in rows] for name in _SCHEMA.names}
    return pa.Table.from_pydict(columns, schema=_SCHEMA)


def from_table(table: pa.Table) -> list[Row]:
    """The inverse of :func:`to_table`; columns that older manifests lack take their defaults.

    Raises:
        KeyError, TypeError: these are not the columns of a manifest.
    """
    return [_row(values) for values in table.to_pylist()]


def read_manifest(path: Path, *, root: Root | None = None) -> Manifest:
    """Read a manifest back, equal to what was written.

    Args:
        path: parquet or JSONL; the latter needs its ``NAME.toml`` beside it.
        root: where the pictures are now, when they were moved.

    Raises:
        FileError: missing, damaged, or not a manifest.
    """
    kind = format_of(path)
    if not path.is_file():
        raise FileError(f"{path} is not there; make it with sdxl bucket-dataset")
    try:
        if kind == "parquet":
            table = pq.read_table(path)
            text = (table.schema.metadata or {})[_KEY].decode()
            rows = tuple(from_table(table))
        else:
            text = path.with_suffix(".toml").read_text(encoding="utf-8")
            rows = tuple(_row(json.loads(line)) for line in _lines(path))
        settings = presets.from_table(_Settings, tomllib.loads(text), path.name)
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise FileError(f"{path} is not a manifest that can be read ({error}); make it again") from error
    where = settings.root if is_url(settings.root) else Path(settings.root)
    return Manifest(root or where, settings.dataset, rows)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.strip())


def _row(values: dict[str, Any]) -> Row:
    """Lists become tuples; an unknown key is an error, and so is an absent one that manifests always had."""
    if odd := (values.keys() - set(_SCHEMA.names)) | (set(_SCHEMA.names) - _NEWER - values.keys()):
        raise KeyError(f"columns {', '.join(sorted(odd))}")
    plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return Row(**plain)
