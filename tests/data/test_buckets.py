from __future__ import annotations

import math
import random

import pytest

from sdxl_cli import presets
from sdxl_cli.data.buckets import BucketConfig, BucketTable, Grid
from sdxl_cli.data.manifest import DatasetConfig
from sdxl_cli.errors import UsageError

PAPER = """
512x2048, 512x1984, 512x1920, 512x1856, 576x1792, 576x1728, 576x1664, 640x1600, 640x1536, 704x1472,
704x1408, 704x1344, 768x1344, 768x1280, 832x1216, 832x1152, 896x1152, 896x1088, 960x1088, 960x1024,
1024x1024, 1024x960, 1088x960, 1088x896, 1152x896, 1152x832, 1216x832, 1280x768, 1344x768, 1408x704,
1472x704, 1536x640, 1600x640, 1664x576, 1728x576, 1792x576, 1856x512, 1920x512, 1984x512, 2048x512
"""
"""arXiv 2307.01952, Appendix I, height x width."""


def table(preset: str) -> BucketTable:
    return presets.load(preset, DatasetConfig).buckets.table()


def test_the_paper_preset_is_the_papers_table() -> None:
    listed = [tuple(map(int, size.split("x"))) for size in PAPER.replace("\n", " ").split(",")]
    assert list(table("buckets-paper").sizes) == [(h, w) for h, w in listed]
    assert len(listed) == 40


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("buckets-256", {(256, 256)}),
        ("buckets-512", {(512, 512)}),
        ("buckets-tiny-128", {(128, 128)}),
        ("buckets-tiny", {(256, 256), (224, 288), (288, 224), (192, 320), (320, 192)}),
    ],
)
def test_stage_presets(preset: str, sizes: set[tuple[int, int]]) -> None:
    assert set(table(preset).sizes) == sizes


def test_a_grid_keeps_to_its_rule_and_is_symmetric() -> None:
    grid = Grid(area=1024 * 1024, max_aspect=3)
    sizes = grid.sizes()
    assert (1024, 1024) in sizes
    for height, width in sizes:
        assert (width, height) in sizes
        assert height % 64 == width % 64 == 0
        assert height * width <= grid.area
        assert max(height, width) / min(height, width) <= 3
        assert (
            min(height, width) + 64 > grid.area / max(height, width) - 1e-9
        )  # the longest short side that fits


def test_the_grid_finds_all_but_a_few_of_the_papers_sizes() -> None:
    paper = set(table("buckets-paper").sizes)
    assert len(paper - set(Grid(area=1024 * 1024).sizes())) <= 7


def test_nearest_is_by_the_logarithm_of_the_aspect_ratio() -> None:
    sizes = table("buckets-paper")
    rng = random.Random(0)
    for _ in range(500):
        size = (rng.randint(20, 5000), rng.randint(20, 5000))
        log = math.log(size[0] / size[1])
        best = min(abs(math.log(h / w) - log) for h, w in sizes.sizes)
        height, width = sizes.nearest(size)
        assert abs(math.log(height / width) - log) == pytest.approx(best)
        assert sizes.aspect_error(size) == pytest.approx(best)


def test_of_buckets_with_one_shape_the_largest_that_needs_no_enlarging_is_taken() -> None:
    squares = BucketTable(((256, 256), (512, 512), (1024, 1024)))
    assert squares.nearest((600, 600)) == (512, 512)
    assert squares.nearest((100, 100)) == (256, 256)


def test_a_bucket_that_no_autoencoder_can_halve_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        BucketConfig(sizes=((100, 100),))
    with pytest.raises(ValueError, match="either"):
        BucketConfig()


def test_a_misspelt_preset_is_named() -> None:
    with pytest.raises(UsageError, match="buckets-paper"):
        table("buckets-papr")
