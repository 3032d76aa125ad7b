"""Dataset files of kohya-ss/sd-scripts: which folders, how often, with which captions, in which buckets.

https://github.com/kohya-ss/sd-scripts, docs/config_README-en.md. Keys may stand in ``[general]``, ``[[datasets]]`` or
``[[datasets.subsets]]``; the innermost one counts.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdxl_cli.data.buckets import Size
from sdxl_cli.data.sources import SIDECARS, SUFFIXES, Found
from sdxl_cli.data.tables import Item
from sdxl_cli.errors import FileError, UsageError, unknown

BUCKET_KEYS = {
    "resolution": 512,
    "enable_bucket": False,
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "bucket_reso_steps": 64,
    "bucket_no_upscale": False,
    "batch_size": 1,
}
"""Keys of ``[[datasets]]`` with their defaults."""

SUBSET_KEYS: dict[str, Any] = {
    "image_dir": None,
    "metadata_file": None,
    "num_repeats": 1,
    "class_tokens": None,
    "caption_extension": None,
    "caption_prefix": "",
    "caption_suffix": "",
    "enable_wildcard": False,
    "flip_aug": False,
    "random_crop": False,
    "is_reg": False,
}
"""Keys of a subset that are followed."""

TRAINING_KEYS = frozenset(
    (
        "alpha_mask", "cache_info", "caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_separator",
        "caption_tag_dropout_rate", "color_aug", "conditioning_data_dir", "custom_attributes", "debug_dataset",
        "face_crop_aug_range", "keep_tokens", "keep_tokens_separator", "max_token_length", "network_multiplier",
        "persistent_data_loader_workers", "prior_loss_weight", "resize_interpolation", "secondary_separator",
        "shuffle_caption", "skip_image_resolution", "token_warmup_min", "token_warmup_step", "validation_seed",
        "validation_split",
    )
)  # fmt: skip
"""Keys that change what is done while training; a manifest has no place for them."""


def find_subsets(path: Path) -> Found:
    """The pictures of every subset, and the bucket settings as ``--set`` texts.

    Raises:
        FileError: the file or a folder in it cannot be read.
        UsageError: a key or value that is not understood.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FileError(f"{path} is not TOML that can be read: {error}") from error
    general = table.get("general", {})
    datasets = table.get("datasets", [])
    if not datasets or unexpected(table, {"general", "datasets"}):
        raise UsageError(
            f"{path}: expected [general] and [[datasets]] with [[datasets.subsets]], as kohya's sd-scripts has"
        )
    levels = [
        ({**general, **_flat(d)}, {**general, **_flat(d), **s})
        for d in datasets
        for s in d.get("subsets", [])
    ]
    if not levels:
        raise UsageError(f"{path}: no [[datasets.subsets]] with an image_dir")
    ignored = {key for _, subset in levels for key in _known(subset, path)}
    folders = [_folder(subset, path) for _, subset in levels]
    root = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    items = [
        item
        for folder, (_, subset) in zip(folders, levels, strict=True)
        for item in _items(folder.resolve(), root, subset, path)
    ]
    notes = (
        [f"not followed, because it is a matter of training: {', '.join(sorted(ignored))}"] if ignored else []
    )
    return Found(root, items, tuple(notes), _settings([d for d, _ in levels], [s for _, s in levels], path))


def unexpected(table: Mapping[str, Any], known: set[str]) -> set[str]:
    """Keys that are not known."""
    return set(table) - known


def bucket_sizes(resolution: Size, least: int, most: int, step: int) -> list[Size]:
    """kohya's table: for every width the height that keeps within the area, and its mirror; (height, width).

    With ``most`` below the long sides that the area allows, its buckets have less area than the square one.
    """
    height, width = resolution
    area = height * width
    side = int(math.sqrt(area)) // step * step
    found = {(side, side)}
    for long in range(least, most + 1, step):
        short = min(most, area // long // step * step)
        if short >= least:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda s: (s[0] / s[1], s))


def _flat(dataset: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dataset.items() if key != "subsets"}


def _known(subset: Mapping[str, Any], path: Path) -> set[str]:
    """The keys that are not followed; a key that nobody knows is an error."""
    every = {*BUCKET_KEYS, *SUBSET_KEYS, *TRAINING_KEYS}
    for key in subset:
        if key not in every:
            raise UsageError(f"{path}: {unknown('key', key, every)}")
    if subset.get("is_reg"):
        raise UsageError(f"{path}: is_reg: regularization pictures are no data set; remove the subset")
    return {key for key in subset if key in TRAINING_KEYS and subset[key]}


def _folder(subset: Mapping[str, Any], path: Path) -> Path:
    name = subset.get("image_dir")
    if not isinstance(name, str):
        raise UsageError(f"{path}: a subset has no image_dir; say where its pictures are")
    folder = Path(name).expanduser()
    if not folder.is_absolute() and not folder.is_dir():
        folder = path.parent / folder  # kohya starts from the working folder
    if not folder.is_dir():
        raise FileError(f"{path}: image_dir {name} is not a folder")
    return folder


def _items(folder: Path, root: Path, subset: Mapping[str, Any], path: Path) -> Iterator[Item]:
    values = {**SUBSET_KEYS, **subset}
    texts = _metadata(values["metadata_file"], path)
    endings = [values["caption_extension"]] if values["caption_extension"] else list(SIDECARS)
    repeats = values["num_repeats"]
    if type(repeats) is not int or repeats < 1:
        raise UsageError(f"{path}: num_repeats is {repeats!r}; it is a whole number of at least 1")
    for picture in sorted(folder.iterdir()):
        if picture.suffix.lower() not in SUFFIXES or picture.name.startswith("."):
            continue
        item = Item(picture.relative_to(root).as_posix(), repeats=repeats)
        if texts is None:
            item = _captioned(item, picture, endings, several=values["enable_wildcard"])
        else:
            known = (texts.get(k) for k in (str(picture), picture.name, picture.stem))
            item = replace(item, captions=next((text for text in known if text), ()))
        if not item.captions and values["class_tokens"]:
            item = replace(item, captions=(values["class_tokens"],))
        pieces = (values["caption_prefix"], values["caption_suffix"])
        yield replace(item, captions=tuple(_around(caption, *pieces) for caption in item.captions))


def _around(caption: str, prefix: str, suffix: str) -> str:
    return " ".join(part for part in (prefix.strip(), caption, suffix.strip()) if part)


def _captioned(item: Item, picture: Path, endings: Sequence[str], *, several: bool) -> Item:
    for ending in endings:
        sidecar = picture.with_suffix(ending)
        if not sidecar.is_file():
            continue
        try:
            lines = [clean for line in sidecar.read_text("utf-8-sig").splitlines() if (clean := line.strip())]
        except (UnicodeDecodeError, OSError):
            return replace(item, problem="caption_unreadable")
        # without wildcards kohya reads the first line only
        return replace(item, captions=tuple(lines if several else lines[:1]))
    return item


def _metadata(name: str | None, path: Path) -> dict[str, tuple[str, ...]] | None:
    """Captions by file name or stem, of kohya's JSON: ``{"NAME": {"caption": …, "tags": …}}``."""
    if name is None:
        return None
    file = Path(name) if Path(name).is_file() else path.parent / name
    try:
        table = json.loads(file.read_text("utf-8"))
        texts = {
            key: ", ".join(value[part] for part in ("caption", "tags") if value.get(part))
            for key, value in table.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise FileError(f"{path}: metadata_file {name} cannot be read: {error}") from error
    return {key: (text,) if text else () for key, text in texts.items()}


def _settings(
    datasets: Sequence[Mapping[str, Any]], subsets: Sequence[Mapping[str, Any]], path: Path
) -> tuple[str, ...]:
    """What the file says about buckets, as ``--set`` texts; all parts must agree, for a manifest has one table."""
    agreed = {key: _agreed(key, default, datasets, path) for key, default in BUCKET_KEYS.items()}
    flip, crop = (_agreed(key, False, subsets, path) for key in ("flip_aug", "random_crop"))
    side = agreed["resolution"]
    # kohya writes (width, height)
    size = (side, side) if isinstance(side, int) else (side[1], side[0])
    sizes = [size]
    if agreed["enable_bucket"]:
        limits = (agreed[key] for key in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"))
        sizes = bucket_sizes(size, *limits)
    text = json.dumps([list(s) for s in sizes])
    return (
        f"buckets.sizes={text}",
        f"flip={json.dumps(bool(flip))}",
        f"crop={'random' if crop else 'center'}",
        f"no_upscale={json.dumps(bool(agreed['bucket_no_upscale']))}",
        f"step={agreed['bucket_reso_steps']}",
        f"batch_size={agreed['batch_size']}",
    )


def _agreed(key: str, default: Any, tables: Sequence[Mapping[str, Any]], path: Path) -> Any:
    values = {json.dumps(table.get(key, default)) for table in tables}
    if len(values) > 1:
        raise UsageError(
            f"{path}: {key} differs ({', '.join(sorted(values))}); a manifest has one; split the file"
        )
    return json.loads(values.pop())
