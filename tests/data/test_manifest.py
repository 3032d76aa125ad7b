from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdxl_cli.data.manifest import DatasetConfig, Manifest, read_manifest, write_manifest
from sdxl_cli.data.scan import read_pixels, verify
from sdxl_cli.data.summary import Filter, summarise
from sdxl_cli.errors import FileError, UsageError
from tests.data.pictures import TINY, make_manifest, noise

CONFIG = DatasetConfig(buckets=TINY, flip=True, crops_per_image=3, seed=5)


def fates(manifest: Manifest) -> dict[str, str]:
    return {row.path: row.fate for row in manifest.rows}


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl"])
def test_what_is_read_back_is_what_was_written(pictures: Path, tmp_path: Path, name: str) -> None:
    (pictures / "broken.png").write_bytes(b"no")
    manifest = make_manifest(pictures, CONFIG)
    write_manifest(tmp_path / name, manifest)
    assert read_manifest(tmp_path / name) == manifest
    moved = pictures.rename(tmp_path / "moved")
    assert read_manifest(tmp_path / name, root=moved).root == moved


def test_older_manifests_are_read(pictures: Path, tmp_path: Path) -> None:
    manifest = make_manifest(pictures, CONFIG)
    write_manifest(tmp_path / "m.parquet", manifest)
    table = pq.read_table(tmp_path / "m.parquet").drop_columns(["tokens_clip_l", "tokens_big_g", "repeats"])
    pq.write_table(table, tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet") == manifest
    pq.write_table(table.drop_columns(["sha256"]), tmp_path / "m.parquet")
    with pytest.raises(FileError, match="sha256"):
        read_manifest(tmp_path / "m.parquet")


def test_a_manifest_is_never_replaced_by_accident(pictures: Path, tmp_path: Path) -> None:
    manifest = make_manifest(pictures, CONFIG)
    write_manifest(tmp_path / "m.parquet", manifest)
    with pytest.raises(FileError, match="exists already"):
        write_manifest(tmp_path / "m.parquet", manifest)
    write_manifest(tmp_path / "m.parquet", manifest, overwrite=True)


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    (tmp_path / "m.jsonl").write_text('{"path": "a"}\n')
    for name in ("m.parquet", "m.jsonl", "nowhere.parquet"):
        with pytest.raises(FileError):
            read_manifest(tmp_path / name)
    with pytest.raises(UsageError, match=r"\.parquet or \.jsonl"):
        read_manifest(tmp_path / "m.csv")


def test_a_manifest_does_not_depend_on_the_number_of_workers(pictures: Path) -> None:
    assert make_manifest(pictures, CONFIG, workers=1) == make_manifest(pictures, CONFIG, workers=3)


def test_a_crop_does_not_depend_on_the_other_pictures(pictures: Path) -> None:
    before = make_manifest(pictures, CONFIG).rows
    table = pictures / "metadata.jsonl"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[1:]))
    after = make_manifest(pictures, CONFIG).rows
    assert after[:-1] == before[3:]
    assert (after[-1].path, after[-1].fate) == ("00.png", "not_listed")


def test_every_row_regenerates_its_pixels_from_what_it_records(pictures: Path) -> None:
    manifest = make_manifest(pictures, CONFIG)
    assert {row.flipped for row in manifest.rows} == {True, False}
    for row in manifest.kept:
        image = Image.open(pictures / row.path)
        assert row.resized_size is not None
        height, width = row.resized_size
        assert row.original_size == (image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        whole = np.asarray(image)[:, ::-1] if row.flipped else np.asarray(image)
        top, left = row.plan.crop_top_left
        cut = whole[top : top + row.plan.target_size[0], left : left + row.plan.target_size[1]]
        assert np.array_equal(read_pixels(pictures, row, CONFIG), cut)
    assert verify(manifest, 100) == (39, [])


def test_verify_sees_a_wrong_crop_a_changed_and_a_lost_picture(pictures: Path) -> None:
    manifest = make_manifest(pictures, replace(CONFIG, crops_per_image=1))
    noise(64, 96, 99).save(pictures / "00.png")
    (pictures / "01.png").unlink()
    rows = [
        replace(row, crop_top_left=(row.plan.crop_top_left[0] + 1, 0)) if row.path == "02.png" else row
        for row in manifest.rows
    ]
    checked, wrong = verify(replace(manifest, rows=tuple(rows)), 100)
    assert checked == 13
    assert {m.path: m.what.split(":")[0] for m in wrong} == {
        "00.png": "changed",
        "01.png": "missing",
        "02.png": "planning it again gives another crop",
    }


def test_every_picture_has_a_fate(pictures: Path) -> None:
    (pictures / "metadata.jsonl").unlink()
    noise(20, 400).save(pictures / "narrow.png")
    (pictures / "copy.png").write_bytes((pictures / "00.png").read_bytes())
    (pictures / "zero.png").touch()
    (pictures / "10.txt").write_text("a caption")
    config = DatasetConfig(buckets=TINY, max_upscale=1.5, max_aspect_error=2, min_side=30)
    found = fates(make_manifest(pictures, config))
    expected = {
        "narrow.png": "too_small",
        "copy.png": "duplicate",
        "zero.png": "empty",
        "04.png": "upscaled_too_far",
    }
    assert expected.items() <= found.items()
    assert found["00.png"] == "kept"
    assert fates(make_manifest(pictures, replace(config, min_side=0)))["narrow.png"] == "too_narrow"
    captioned = fates(make_manifest(pictures, replace(config, require_captions=True)))
    assert [path for path, fate in captioned.items() if fate == "kept"] == ["10.png"]


def test_of_two_files_with_the_same_bytes_the_first_is_kept(pictures: Path) -> None:
    (pictures / "metadata.jsonl").unlink()
    (pictures / "zz.png").write_bytes((pictures / "00.png").read_bytes())
    config = DatasetConfig(buckets=TINY)
    assert fates(make_manifest(pictures, config))["zz.png"] == "duplicate"
    assert fates(make_manifest(pictures, replace(config, keep_duplicates=True)))["zz.png"] == "kept"


def test_the_size_condition_is_that_of_the_original_when_the_source_knows_it(tmp_path: Path) -> None:
    noise(80, 80).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name":"a.png","original_width":900,"original_height":700}\n'
    )
    row = make_manifest(tmp_path, DatasetConfig(buckets=TINY)).rows[0]
    assert row.original_size == (700, 900)
    assert row.stored_size == (80, 80)
    assert row.scale == 1.0


def test_the_summary_counts_pictures_once(pictures: Path) -> None:
    (pictures / "zero.png").touch()
    summary = summarise(make_manifest(pictures, CONFIG).rows)
    assert (summary.pictures, summary.kept, summary.crops) == (14, 13, 39)
    assert summary.refused == {"not_listed": 1}
    assert sum(b.pictures for b in summary.buckets) == 13
    assert summary.filters[1] == Filter(256, 13, 1.0)
    assert summary.upscaled == 1 + 1
    assert summary.largest_scale == 2.0
