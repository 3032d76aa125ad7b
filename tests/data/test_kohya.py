from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sdxl_cli import cli
from sdxl_cli.data.kohya import bucket_sizes
from sdxl_cli.data.manifest import read_manifest
from sdxl_cli.data.sources import find
from sdxl_cli.data.tables import Item
from sdxl_cli.errors import FileError, SdxlError, UsageError
from tests.data.pictures import noise

DATASET = """
[general]
caption_extension = ".txt"
shuffle_caption = true
enable_bucket = true

[[datasets]]
resolution = [128, 96]
min_bucket_reso = 64
max_bucket_reso = 256
bucket_reso_steps = 32
batch_size = 3

  [[datasets.subsets]]
  image_dir = "cats"
  num_repeats = 4
  caption_prefix = "photo of"
  random_crop = true

  [[datasets.subsets]]
  image_dir = "dogs"
  class_tokens = "a dog"
  random_crop = true
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for name in ("cats/a.png", "cats/b.png", "dogs/d.png", "cats/deep/not.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(100, 130, sum(name.encode())).save(tmp_path / name)
    (tmp_path / "cats" / "a.txt").write_text("a cat\nsecond line")
    (tmp_path / "set.toml").write_text(DATASET)
    return tmp_path / "set.toml"


def test_subsets_repeats_and_captions(dataset: Path) -> None:
    found = find(dataset)
    assert found.root == dataset.parent.resolve()
    assert found.items == [
        Item("cats/a.png", ("photo of a cat",), repeats=4),
        Item("cats/b.png", repeats=4),
        Item("dogs/d.png", ("a dog",)),
    ]
    assert found.notes == ("not followed, because it is a matter of training: shuffle_caption",)


def test_its_buckets_are_used_unless_others_are_asked_for(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    assert cli.run(["bucket-dataset", str(dataset), "-o", str(out), "-q"]) == 0
    config = read_manifest(out).config
    assert config.buckets.sizes == tuple(bucket_sizes((96, 128), 64, 256, 32))
    assert (config.crop, config.flip, config.batch_size) == ("random", False, 3)
    assert [row.repeats for row in read_manifest(out).kept] == [4, 4, 1]
    assert (
        cli.run(
            ["bucket-dataset", str(dataset), "-o", str(out), "-q", "--overwrite", "--preset", "buckets-256"]
        )
        == 0
    )
    assert read_manifest(out).config.buckets.sizes == ((256, 256),)


@pytest.mark.parametrize(
    ("side", "least", "most"), [(1024, 256, 1024), (1024, 512, 2048), (512, 256, 1024), (640, 320, 960)]
)
def test_the_table_is_the_one_of_sd_scripts(side: int, least: int, most: int) -> None:
    """Its rule in its own words: all widths from least to most, the height that is left, both ways round."""
    expected = {(int(math.sqrt(side * side) // 64) * 64,) * 2}
    width = least
    while width <= most:
        height = min(most, int((side * side // width) // 64) * 64)
        if height >= least:
            expected |= {(width, height), (height, width)}
        width += 64
    assert set(bucket_sizes((side, side), least, most, 64)) == expected


def test_captions_from_its_json(dataset: Path) -> None:
    table = {
        "a": {"caption": "one", "tags": "red, round"},
        str(dataset.parent / "cats" / "b.png"): {"tags": "blue"},
    }
    (dataset.parent / "meta.json").write_text(json.dumps(table))
    dataset.write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nmetadata_file = "meta.json"\n'
    )
    assert [item.captions for item in find(dataset).items] == [("one, red, round",), ("blue",)]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("[", FileError, "not TOML"),
        ("[model]", UsageError, "datasets"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='cats'\nnum_repeat=2", UsageError, "num_repeats"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='cats'\nis_reg=true", UsageError, "is_reg"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='cats'\nnum_repeats=0", UsageError, "at least 1"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='birds'", FileError, "birds is not a folder"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats=1", UsageError, "no image_dir"),
        (
            "[[datasets]]\nresolution=512\n[[datasets.subsets]]\nimage_dir='cats'\n"
            "[[datasets]]\nresolution=768\n[[datasets.subsets]]\nimage_dir='dogs'",
            UsageError,
            "resolution differs",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(
    dataset: Path, text: str, kind: type[SdxlError], message: str
) -> None:
    dataset.write_text(text)
    with pytest.raises(kind, match=message):
        find(dataset)
