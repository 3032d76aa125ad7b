"""Flat and blended colours: what teaches an autoencoder hues that pictures of objects show too seldom."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from colours import BACKGROUNDS, Array
from PIL import Image

SIDE = 256


def write_flats(folder: Path, count: int, *, seed: int) -> None:
    """``count`` 256x256 PNGs and a ``metadata.jsonl`` (file_name, text) into the new ``folder``."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, 1])
    makers = (_flat, _flat, _gradient, _blobs, _stripes)
    rows = []
    for index in range(count):
        make = makers[index % len(makers)]
        name = f"{index:04d}-{make.__name__.strip('_')}.png"
        pixels = make(rng)
        Image.fromarray((pixels * 255 + 0.5).clip(0, 255).astype(np.uint8)).save(folder / name)
        rows.append({"file_name": name, "text": "plain colours"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _colour(rng: np.random.Generator) -> Array:
    """A named colour, slightly off, or (one time in two) any sRGB; 0..1."""
    if rng.random() < 0.5:
        return rng.random(3).astype(np.float32)
    named = np.array(list(BACKGROUNDS.values()), np.float32)[rng.integers(len(BACKGROUNDS))] / 255
    return np.asarray((named + rng.normal(0, 0.02, 3)).clip(0, 1), np.float32)


def _flat(rng: np.random.Generator) -> Array:
    return np.broadcast_to(_colour(rng), (SIDE, SIDE, 3))


def _ramp(rng: np.random.Generator) -> Array:
    """A plane wave's phase over the square in a random direction, 0..1, ``[256, 256]``."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    plane = x * np.cos(angle) + y * np.sin(angle)
    return np.asarray((plane - plane.min()) / (plane.max() - plane.min()), np.float32)


def _gradient(rng: np.random.Generator) -> Array:
    ramp = _ramp(rng)[..., None]
    return _colour(rng) * (1 - ramp) + _colour(rng) * ramp


def _blobs(rng: np.random.Generator) -> Array:
    """Soft patches of a few colours: random colours on a coarse grid, enlarged smoothly."""
    cells = int(rng.integers(3, 7))
    grid = np.stack([_colour(rng) for _ in range(cells * cells)]).reshape(cells, cells, 3)
    small = Image.fromarray((grid * 255).astype(np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / np.float32(255)


def _stripes(rng: np.random.Generator) -> Array:
    """Hard-edged bands of two to five colours."""
    bands = int(rng.integers(2, 6))
    index = np.minimum((_ramp(rng) * bands).astype(int), bands - 1)
    return np.asarray(np.stack([_colour(rng) for _ in range(bands)])[index], np.float32)
