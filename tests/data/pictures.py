"""Pictures and manifests that several tests make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_cli.data.buckets import BucketConfig
from sdxl_cli.data.manifest import DatasetConfig, Manifest
from sdxl_cli.data.scan import Engine, finished, scan
from sdxl_cli.data.sources import find

TINY = BucketConfig(sizes=((64, 96), (80, 80), (96, 64)))


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture without two alike places: wrong crops cannot hide in it."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def make_manifest(
    root: Path | str, config: DatasetConfig, *, workers: int = 1, engine: Engine = "local"
) -> Manifest:
    found = find(root, config.columns)
    scanned = scan(found.root, found.items, config, workers=workers, engine=engine)
    return Manifest(found.root, config, finished([row for rows in scanned for row in rows], config))
