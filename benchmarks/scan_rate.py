"""How fast a folder is scanned, against imagesize and against opening every picture as trainers do; one core, one run.

python benchmarks/scan_rate.py [PICTURES]   makes that many JPEG files (20000) in a temporary folder, then times.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import imagesize
from PIL import Image, ImageDraw

from sdxl_cli import presets
from sdxl_cli.data.manifest import DatasetConfig
from sdxl_cli.data.scan import scan
from sdxl_cli.data.sources import find


def make(folder: Path, count: int) -> int:
    """Photograph-sized JPEG files, 256 ... 1024 pixels; the bytes that they take."""
    rng = random.Random(0)
    for number in range(count):
        width, height = (rng.randrange(256, 1025) for _ in range(2))
        image = Image.effect_noise((width // 8, height // 8), 60).resize((width, height)).convert("RGB")
        draw = ImageDraw.Draw(image)
        draw.ellipse((width // 4, height // 4, width // 2, height // 2), fill=(number % 255, 90, 140))
        image.save(folder / f"{number:06d}.jpg", quality=85)
        (folder / f"{number:06d}.txt").write_text("a disc on a cloudy ground")
    return sum(path.stat().st_size for path in folder.glob("*.jpg"))


def timed(name: str, count: int, work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    rate = count / (time.process_time() - start)
    print(f"{name:44} {rate:10.0f} pictures/s", flush=True)
    return rate


def ours(folder: Path, config: DatasetConfig) -> None:
    found = find(folder)
    rows = [row for rows in scan(found.root, found.items, config) for row in rows]
    assert all(row.kept for row in rows)


def with_imagesize(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.name.endswith(".jpg"):
            assert imagesize.get(entry.path)[0] > 0


def as_trainers_do(folder: Path) -> None:
    """Open with Pillow for the size, and read the caption."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name.endswith(".jpg"):
            with Image.open(entry.path) as image:
                assert image.size[0] > 0
            Path(entry.path).with_suffix(".txt").read_text()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    config = presets.load("buckets-paper", DatasetConfig)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make(folder, count)
        print(f"{count} pictures, {size / count / 1000:.0f} kB each; CPU time of one core, files in memory")
        header = timed(
            "sdxl, header, with sha256 and plan", count, lambda: ours(folder, replace(config, check="header"))
        )
        reader = timed("imagesize (size only)", count, lambda: with_imagesize(folder))
        trainer = timed("Pillow header and caption, as trainers do", count, lambda: as_trainers_do(folder))
        timed("sdxl, every pixel decoded", count, lambda: ours(folder, config))
    print(f"header scan: {header / reader:.2f} of imagesize, {header / trainer:.2f} of Pillow")


if __name__ == "__main__":
    main()
