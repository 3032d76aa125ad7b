"""Real photographs, of the sizes and kinds that scikit-image ships: each one's recorded crop is its training pixels."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageCms, ImageOps

from sdxl_cli import cli
from sdxl_cli.data.manifest import Manifest, read_manifest
from sdxl_cli.data.scan import read_pixels

PHOTOGRAPHS = [
    *["astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg"],
    *["ihc.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg"],
]
SMALL = "microaneurysms.png"
"""102 x 102."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in [*PHOTOGRAPHS, SMALL]:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
        (folder / name).with_suffix(".txt").write_text(f"a photograph called {name}\n")
    return folder


@pytest.fixture(scope="module", params=["buckets-paper", "buckets-512", "buckets-256"])
def manifest(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Manifest:
    output = tmp_path_factory.mktemp("manifests") / "photographs.parquet"
    options = ["--preset", request.param, "--flip", "--crops-per-image", "2", "--verify", "24", "-q"]
    assert cli.run(["bucket-dataset", str(folder), *options, "-o", str(output)]) == 0
    return read_manifest(output)


def upright(path: Path) -> Image.Image:
    """In sRGB, the shortest way."""
    image = Image.open(path)
    if profile := image.info.get("icc_profile"):
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB") or image
    return image.convert("RGB")


def test_all_are_kept_with_their_size(manifest: Manifest, folder: Path) -> None:
    assert {row.path for row in manifest.kept} == {*PHOTOGRAPHS, SMALL}
    for row in manifest.kept:
        width, height = Image.open(folder / row.path).size
        assert row.original_size == (height, width)
        assert list(row.captions) == [f"a photograph called {row.path}"]


def test_each_is_in_the_bucket_of_the_nearest_shape(manifest: Manifest) -> None:
    table = manifest.config.buckets.table().sizes
    for row in manifest.kept:
        assert row.original_size is not None
        shape = math.log(row.original_size[0] / row.original_size[1])
        distances = [abs(math.log(height / width) - shape) for height, width in table]
        height, width = row.plan.target_size
        assert abs(math.log(height / width) - shape) == pytest.approx(min(distances), abs=1e-9)


def test_the_recorded_numbers_are_the_training_pixels(manifest: Manifest, folder: Path) -> None:
    """By Pillow and array slices alone."""
    for row in manifest.kept:
        plan = row.plan
        image = upright(folder / row.path)
        assert ("icc_converted" in row.notes) == (row.path == "rocket.jpg"), (
            "the one with another colour space"
        )
        image = image.resize(plan.resized_size[::-1], Image.Resampling.LANCZOS)
        pixels = np.asarray(ImageOps.mirror(image) if plan.flipped else image)
        (top, left), (height, width) = plan.crop_top_left, plan.target_size
        expected = pixels[top : top + height, left : left + width]
        assert np.array_equal(read_pixels(manifest.root, row, manifest.config), expected), row.path


def test_a_minimum_size_would_have_lost_the_small_one(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "large.parquet"
    options = ["--preset", "buckets-256", "--set", "min_side=256", "-q"]
    assert cli.run(["bucket-dataset", str(folder), *options, "-o", str(output)]) == 0
    assert {row.path for row in read_manifest(output).kept} == set(PHOTOGRAPHS)
