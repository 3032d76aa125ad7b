"""Picture files: what goes in comes out, and nothing is ever overwritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.picture import (
    Pixels,
    Texts,
    next_index,
    read_pixels,
    read_texts,
    target,
    write_picture,
)

TEXTS = Texts("ein Fuß, 日本 🎸\nNegative prompt: naïve\nSteps: 3, Seed: 1, Size: 8x8", '{"a": "日本 🎸"}')


@pytest.fixture
def pixels() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_texts_come_back_from_every_format(tmp_path: Path, pixels: Pixels, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    write_picture(path, pixels, TEXTS)
    assert read_texts(path) == TEXTS
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [path.name]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_pixels_come_back_unchanged_where_the_format_is_lossless(
    tmp_path: Path, pixels: Pixels, suffix: str
) -> None:
    write_picture(tmp_path / f"p{suffix}", pixels, Texts())
    assert np.array_equal(read_pixels(tmp_path / f"p{suffix}"), pixels)
    assert read_texts(tmp_path / f"p{suffix}") == Texts()


def test_jpeg_comment_is_where_other_front_ends_look(tmp_path: Path, pixels: Pixels) -> None:
    """EXIF UserComment: the code UNICODE, then UTF-16, as A1111 writes through piexif."""
    write_picture(tmp_path / "p.jpg", pixels, TEXTS)
    comment = Image.open(tmp_path / "p.jpg").getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == TEXTS.parameters


def test_metadata_too_long_for_a_jpeg_is_refused_not_cut(tmp_path: Path, pixels: Pixels) -> None:
    with pytest.raises(UsageError, match="write a PNG"):
        write_picture(tmp_path / "p.jpg", pixels, Texts("x" * 40000, ""))
    assert not (tmp_path / "p.jpg").exists()


def test_names_count_up_and_skip_what_is_there(tmp_path: Path, pixels: Pixels) -> None:
    (tmp_path / "sdxl-00007-1.png").touch()
    (tmp_path / "other-00100-1.png").touch()
    (tmp_path / "sdxl-x.png").touch()
    place = target(str(tmp_path), prefix="sdxl")
    assert [place.save(pixels, seed, Texts()).name for seed in (5, 6)] == [
        "sdxl-00008-5.png",
        "sdxl-00009-6.png",
    ]
    assert next_index(tmp_path, "new") == 0


def test_a_name_taken_in_between_is_not_overwritten(
    tmp_path: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    indices = iter([0, 1])
    monkeypatch.setattr("sdxl_cli.generation.picture.next_index", lambda *_: next(indices))
    (tmp_path / "sdxl-00000-5.png").write_bytes(b"somebody else's")
    assert target(str(tmp_path), prefix="sdxl").save(pixels, 5, Texts()).name == "sdxl-00001-5.png"
    assert (tmp_path / "sdxl-00000-5.png").read_bytes() == b"somebody else's"


def test_a_file_name_is_kept_and_not_replaced_unless_asked(tmp_path: Path, pixels: Pixels) -> None:
    file = tmp_path / "new folder" / "cat.png"
    assert target(str(file), prefix="sdxl").save(pixels, 5, Texts()) == file
    with pytest.raises(UsageError, match=r"there already.*--overwrite"):
        target(str(file), prefix="sdxl")
    assert target(str(file), prefix="sdxl", overwrite=True).save(255 - pixels, 5, Texts()) == file
    assert np.array_equal(read_pixels(file), 255 - pixels)


def test_several_pictures_count_up_from_a_file_name(tmp_path: Path, pixels: Pixels) -> None:
    place = target(str(tmp_path / "cat.webp"), prefix="sdxl", count=2)
    assert [place.save(pixels, seed, Texts()).name for seed in (5, 6)] == [
        "cat-00000-5.webp",
        "cat-00001-6.webp",
    ]


def test_an_unknown_format_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'.pngg'; did you mean .png"):
        target("cat.pngg", prefix="sdxl")


def test_pictures_are_upright_and_on_white(tmp_path: Path) -> None:
    sideways = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sideways.save(tmp_path / "phone.jpg", exif=exif)
    assert read_pixels(tmp_path / "phone.jpg").shape == (4, 2, 3)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_pixels(tmp_path / "clear.png").min() == 255
    Image.new("L", (2, 2), 7).save(tmp_path / "gray.png")
    assert read_pixels(tmp_path / "gray.png").shape == (2, 2, 3)
    Image.new("CMYK", (2, 2)).save(tmp_path / "print.jpg")
    assert read_pixels(tmp_path / "print.jpg").shape == (2, 2, 3)


def test_what_is_no_picture_is_a_file_error(tmp_path: Path, pixels: Pixels) -> None:
    (tmp_path / "text.png").write_text("no picture")
    write_picture(tmp_path / "whole.png", pixels, Texts())
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    for name, words in {
        "text.png": "not a picture",
        "half.png": "damaged",
        "gone.png": "no such file",
        "": "is a folder",
    }.items():
        with pytest.raises(FileError, match=words):
            read_pixels(tmp_path / name)
