from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdxl_cli.data.sources import find
from sdxl_cli.data.tables import Item
from sdxl_cli.errors import FileError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def table(path: Path, *rows: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_sidecars_give_a_caption_a_line(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "sub/a.png", "c.webp", "notes.md", ".hidden.png")
    (tmp_path / "b.txt").write_text("\ufeffone\n\n  two \n", encoding="utf-8")
    (tmp_path / "sub" / "a.caption").write_text("three", encoding="utf-8")
    assert find(tmp_path).items == [
        Item("b.JPG", ("one", "two")),
        Item("c.webp"),
        Item("sub/a.png", ("three",)),
    ]


def test_a_caption_that_is_no_text_is_a_problem_with_a_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    assert find(tmp_path).items == [Item("a.png", problem="caption_unreadable")]


def test_metadata_jsonl(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images/b.png", "stray.png")
    table(
        tmp_path / "metadata.jsonl",
        {"file_name": "images/b.png", "texts": ["x", " y "], "text": "x", "aesthetic_score": 5.5},
        {"file_name": "images/a.png", "caption": "z", "original_width": 640, "original_height": 480},
    )
    assert find(tmp_path).items == [
        Item("images/b.png", ("x", "y"), aesthetic_score=5.5),
        Item("images/a.png", ("z",), original_size=(480, 640)),
        Item("stray.png", problem="not_listed"),
    ]


def test_metadata_csv(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text,aesthetic_score\na.png,"a cat, sitting",\n')
    assert find(tmp_path).items == [Item("a.png", ("a cat, sitting",))]


def test_a_folder_with_its_own_table_below_a_table_is_another_data_set(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "flats/f.png")
    table(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "a"})
    table(tmp_path / "flats" / "metadata.jsonl", {"file_name": "f.png", "text": "flat"})
    assert find(tmp_path).items == [Item("a.png", ("a",))]
    assert find(tmp_path).notes == ("left out, because it is a data set of its own: flats",)


def test_without_a_table_at_the_top_the_ones_below_describe_their_folders(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.png", "two/b.png")
    table(tmp_path / "one" / "metadata.jsonl", {"file_name": "a.png", "text": "a"})
    (tmp_path / "two" / "b.txt").write_text("b")
    assert find(tmp_path).items == [Item("one/a.png", ("a",)), Item("two/b.png", ("b",))]
    assert find(tmp_path).notes == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"text": "x"}', "line 1 has no file_name"),
        ('{"file_name": "a.png", "text": 3}', "line 1: text is not text"),
        ('{"file_name": "a.png", "aesthetic_score": "good"}', "line 1: aesthetic_score is 'good'"),
    ],
)
def test_a_broken_table_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(FileError, match=message):
        find(tmp_path)


def test_a_folder_that_is_missing_or_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not a folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(FileError, match="no pictures"):
        find(tmp_path)
