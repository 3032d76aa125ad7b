"""Tars, parquet files and URLs: everything that is not a plain folder of pictures."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdxl_cli.data.hygiene import Refused
from sdxl_cli.data.manifest import DatasetConfig, read_manifest, write_manifest
from sdxl_cli.data.scan import read_pixels, verify
from sdxl_cli.data.sources import find
from sdxl_cli.data.storage import open_storage
from sdxl_cli.data.tables import Columns, Item
from sdxl_cli.errors import FileError, UsageError
from tests.data.pictures import TINY, make_manifest, noise

CONFIG = DatasetConfig(buckets=TINY)


def png(height: int, width: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise(height, width, seed).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> None:
    """A tar, written by the standard library."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(number: int, **description: object) -> dict[str, bytes]:
    """What img2dataset writes of one picture that it shrank to 80 x 120."""
    key = f"{number:09d}"
    row = {
        "key": key,
        "caption": f"in json {number}",
        "width": 120,
        "height": 80,
        "status": "success",
        **description,
    }
    return {
        f"{key}.png": png(80, 120, number),
        f"{key}.txt": f"caption {number}".encode(),
        f"{key}.json": json.dumps(row).encode(),
    }


def test_shards_of_img2dataset_give_captions_and_the_size_before_shrinking(tmp_path: Path) -> None:
    shard(tmp_path / "00000.tar", sample(0, original_width=3000, original_height=2000) | sample(1))
    shard(
        tmp_path / "00001.tar",
        {k: v for k, v in sample(2, aesthetic_score=5.5).items() if not k.endswith("txt")},
    )
    pq.write_table(pa.table({"caption": ["of the shard"]}), tmp_path / "00000.parquet")
    found = find(tmp_path)
    assert found.items == [
        Item("00000.tar/000000000.png", ("caption 0",), original_size=(2000, 3000)),
        Item("00000.tar/000000001.png", ("caption 1",)),
        Item("00001.tar/000000002.png", ("in json 2",), aesthetic_score=5.5),
    ]
    assert found.notes == ()
    assert find(tmp_path / "00001.tar").items[0].path == "00001.tar/000000002.png"
    manifest = make_manifest(tmp_path, CONFIG)
    row = manifest.kept[0]
    assert (row.original_size, row.stored_size) == ((2000, 3000), (80, 120))
    assert verify(manifest, 10) == (3, [])
    top, left = row.plan.crop_top_left
    expected = Image.open(io.BytesIO(png(80, 120, 0))).resize((96, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(
        read_pixels(tmp_path, row, CONFIG), np.asarray(expected)[top : top + 64, left : left + 96]
    )


def test_failed_downloads_and_broken_tars_have_a_fate(tmp_path: Path) -> None:
    failed = {"000000007.json": b'{"caption": "gone", "status": "failed_to_download"}'}
    shard(tmp_path / "a.tar", sample(0) | failed)
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    whole = tmp_path / "c.tar"
    shard(whole, sample(1) | {"000000002.png": png(80, 120, 2)})
    whole.write_bytes(whole.read_bytes()[:-18_000])  # cut off within the last picture
    rows = {row.path: row.fate for row in make_manifest(tmp_path, CONFIG).rows}
    assert rows == {
        "a.tar/000000000.png": "kept",
        "a.tar/000000007": "no_picture",
        "b.tar": "shard_broken",
        "c.tar/000000001.png": "kept",
        "c.tar/000000002.png": "truncated",
        "c.tar": "shard_truncated",
    }


def test_parquet_with_pictures_in_it(tmp_path: Path) -> None:
    struct = [{"bytes": png(80, 80, i), "path": None} for i in range(5)] + [None]
    table = pa.table({"image": struct, "text": [f"t{i}" for i in range(6)], "original_width": [900] * 6,
                      "original_height": [700] * 6})  # fmt: skip
    pq.write_table(table, tmp_path / "train-00000.parquet", row_group_size=2)
    manifest = make_manifest(tmp_path, CONFIG)
    assert [(row.path, row.fate, row.captions) for row in manifest.rows] == [
        *((f"train-00000.parquet/image/{i}", "kept", (f"t{i}",)) for i in range(5)),
        ("train-00000.parquet/image/5", "empty", ("t5",)),
    ]
    assert manifest.rows[0].original_size == (700, 900)
    for i in (4, 0, 3):
        assert np.array_equal(read_pixels(tmp_path, manifest.rows[i], CONFIG), np.asarray(noise(80, 80, i)))
    with pytest.raises(Refused, match="missing"):
        open_storage(tmp_path).read("train-00000.parquet/image/6")


def test_parquet_that_names_files_in_columns_found_or_given(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(80, 80))
    pq.write_table(
        pa.table({"path": ["a.png"], "caption": ["found"], "blip": ["given"]}), tmp_path / "t.parquet"
    )
    assert find(tmp_path / "t.parquet").items == [Item("a.png", ("found",))]
    assert find(tmp_path / "t.parquet", Columns(caption="blip")).items == [Item("a.png", ("given",))]
    with pytest.raises(UsageError, match="did you mean blip"):
        find(tmp_path / "t.parquet", Columns(caption="blipp"))
    notes = find(tmp_path).notes
    assert len(notes) == 1
    assert notes[0].startswith("not read: t.parquet")
    pq.write_table(pa.table({"number": [1]}), tmp_path / "n.parquet")
    with pytest.raises(FileError, match="no column of pictures or file names among number"):
        find(tmp_path / "n.parquet")


def test_metadata_parquet_describes_a_folder(tmp_path: Path) -> None:
    for name in ("a.png", "stray.png"):
        (tmp_path / name).write_bytes(png(80, 80))
    pq.write_table(pa.table({"file_name": ["a.png"], "text": ["x"]}), tmp_path / "metadata.parquet")
    assert find(tmp_path).items == [Item("a.png", ("x",)), Item("stray.png", problem="not_listed")]


@pytest.mark.parametrize("kind", ["files", "tar"])
def test_behind_a_url_it_is_the_same_manifest(tmp_path: Path, kind: str) -> None:
    names = {"sub/b.png": png(90, 70, 1), "sub/b.txt": b"two", "a.png": png(80, 80), "a.txt": b"one"}
    folder = tmp_path / "d"
    for name, data in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if kind == "tar":
        folder = tmp_path / "t"
        folder.mkdir()
        shard(folder / "s.tar", names)
    remote = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}-{kind}"
    remote.put(f"{folder}/", f"/{tmp_path.name}-{kind}/", recursive=True)
    near, far = make_manifest(folder, CONFIG), make_manifest(url, CONFIG)
    assert far.rows == near.rows
    assert len(far.kept) == 2
    write_manifest(tmp_path / "m.jsonl", far)
    assert read_manifest(tmp_path / "m.jsonl") == far
    assert verify(far, 5) == (2, [])


def test_a_url_that_nothing_reads(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nonsense://x"):
        find("nonsense://x/y")
