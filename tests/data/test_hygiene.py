from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from sdxl_cli.data.hygiene import Hygiene, Opened, Refused, open_picture, read_header
from sdxl_cli.data.storage import open_storage
from tests.data.pictures import noise


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes, **settings: Any) -> Opened:
    result = open_picture(data, Hygiene(**settings))
    assert result.image.mode == "RGB"
    return result


def pixels(picture: Opened) -> np.ndarray[Any, Any]:
    return np.asarray(picture.image)


def refusal(data: bytes, **settings: Any) -> str:
    with pytest.raises(Refused) as caught:
        open_picture(data, Hygiene(**settings))
    return caught.value.reason


def test_a_plain_picture_comes_through_untouched() -> None:
    image = noise(20, 30)
    picture = opened(encoded(image))
    assert np.array_equal(pixels(picture), np.asarray(image))
    assert (picture.size, picture.orientation, picture.notes) == ((20, 30), 1, ())


@pytest.mark.parametrize("orientation", range(2, 9))
def test_pictures_are_turned_upright_as_exif_says(orientation: int) -> None:
    image = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    picture = opened(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(pixels(picture), np.asarray(expected))
    assert picture.size == ((20, 30) if orientation < 5 else (30, 20))
    assert picture.orientation == orientation
    assert picture.notes == ("rotated",)


def test_an_orientation_without_meaning_is_noticed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 42
    assert opened(encoded(noise(4, 4), exif=exif)).notes == ("exif_broken",)


def test_alpha_is_laid_on_the_declared_background() -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 0, 255))
    image.putpixel((1, 0), (9, 9, 9, 0))
    picture = opened(encoded(image), background=(10, 20, 30))
    assert pixels(picture).tolist() == [[[200, 100, 0], [10, 20, 30]]]
    assert picture.notes == ("alpha_flattened",)


def test_a_half_transparent_pixel_is_halfway_to_the_background() -> None:
    picture = opened(encoded(Image.new("RGBA", (1, 1), (200, 100, 0, 128))))
    assert np.abs(pixels(picture)[0, 0].astype(int) - [227, 177, 127]).max() <= 1


@pytest.mark.parametrize("mode", ["P", "LA", "L", "RGB"])
def test_every_kind_of_transparency_is_seen(mode: str) -> None:
    clear: dict[str, Any] = {"P": 0, "L": 0, "RGB": (0, 0, 0)}
    image = Image.new("LA", (2, 2), (0, 0)) if mode == "LA" else Image.new(mode, (2, 2), 0)
    options = {} if mode == "LA" else {"transparency": clear[mode]}
    picture = opened(encoded(image, **options), background=(1, 2, 3))
    assert pixels(picture)[0, 0].tolist() == [1, 2, 3]


def test_opaque_alpha_changes_nothing() -> None:
    image = noise(5, 5).convert("RGBA")
    assert opened(encoded(image)).notes == ()


def wide_gamut() -> bytes:
    """An ICC profile that is not sRGB: Lab's own is; here sRGB with its name changed and red and blue swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(profile[131])}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red + 4 : red + 12], profile[blue + 4 : blue + 12] = (
        profile[blue + 4 : blue + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_other_colour_spaces_become_srgb() -> None:
    picture = opened(encoded(Image.new("RGB", (2, 2), (255, 0, 0)), icc_profile=wide_gamut()))
    assert picture.notes == ("icc_converted",)
    red, green, blue = pixels(picture)[0, 0]
    assert blue > 250
    assert max(red, green) < 6


def test_alpha_survives_the_colour_conversion() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    picture = opened(encoded(image, icc_profile=wide_gamut()))
    assert picture.notes == ("icc_converted", "alpha_flattened")
    assert pixels(picture)[0, 1].tolist() == [255, 255, 255]


def test_a_broken_profile_is_noticed_and_the_values_kept() -> None:
    image = noise(4, 4)
    picture = opened(encoded(image, icc_profile=b"nonsense" * 40))
    assert picture.notes == ("icc_broken",)
    assert np.array_equal(pixels(picture), np.asarray(image))


def test_cmyk_becomes_rgb() -> None:
    picture = opened(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert picture.notes == ("cmyk",)
    red, green, blue = pixels(picture)[4, 4]
    assert red > 240
    assert max(green, blue) < 15


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    picture = opened(encoded(Image.fromarray(values)))
    assert pixels(picture)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert picture.notes == ("sixteen_bit",)


def test_floating_point_is_refused() -> None:
    assert refusal(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")) == "unknown_depth"


def test_several_frames_are_refused_or_the_first_one_taken() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert refusal(data) == "animated"
    picture = opened(data, animated="first")
    assert picture.notes == ("first_frame",)
    assert pixels(picture)[0, 0].tolist() == [255, 0, 0]


def test_a_small_file_of_a_huge_picture_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    assert refusal(bomb) == "too_many_pixels"
    assert refusal(encoded(noise(50, 50)), max_pixels=2499) == "too_many_pixels"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_half_a_file_is_truncated_not_grey(kind: str) -> None:
    data = encoded(noise(64, 64), kind)
    assert refusal(data[: len(data) // 2]) in ("truncated", "damaged")


def test_a_truncated_jpeg_says_so() -> None:
    data = encoded(noise(64, 64), "JPEG")
    assert refusal(data[: len(data) // 2]) == "truncated"


def test_what_is_no_picture_says_so() -> None:
    assert refusal(b"<html>404</html>") == "not_an_image"


def test_a_wrong_extension_is_noticed() -> None:
    assert open_picture(encoded(noise(4, 4)), Hygiene(), suffix=".jpg").notes == ("wrong_extension",)
    assert open_picture(encoded(noise(4, 4), "JPEG"), Hygiene(), suffix=".JPEG").notes == ()


def test_files_that_are_missing_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for name, reason in (("empty.png", "empty"), ("nowhere.png", "missing"), (".", "unreadable")):
        with pytest.raises(Refused) as caught:
            open_storage(tmp_path).read(name)
        assert caught.value.reason == reason


def sixteen_bit_png(height: int, width: int, seed: int = 0) -> tuple[bytes, np.ndarray[Any, Any]]:
    """A colour PNG with 16 bits a channel, which Pillow cannot write: chunks by hand, filter 0."""
    values = np.random.default_rng(seed).integers(0, 65536, (height, width, 3), np.uint16)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )
    return data, values


def test_sixteen_bit_colour_keeps_the_upper_eight_and_is_noticed() -> None:
    data, values = sixteen_bit_png(6, 5)
    picture = opened(data)
    assert picture.notes == ("sixteen_bit",)
    assert np.array_equal(pixels(picture), (values >> 8).astype(np.uint8))
    assert opened(encoded(noise(5, 5))).notes == ()


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_header_says_what_decoding_finds(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(20, 30), kind, exif=exif)
    header, picture = read_header(data, Hygiene()), opened(data)
    assert (header.size, header.orientation, header.notes) == (
        picture.size,
        picture.orientation,
        picture.notes,
    )


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_whatever_is_broken_is_refused_or_opened_and_never_raises_anything_else(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(
        noise(24, 31), kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {})
    )
    rng = np.random.default_rng(0)
    reasons = set()
    for _ in range(120):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 400), rng.integers(1, 6)):
            data[place] = rng.integers(0, 256)
        cut = len(data) if rng.random() < 0.5 else int(rng.integers(1, len(data)))
        try:
            assert open_picture(bytes(data[:cut]), Hygiene(max_pixels=100_000)).image.mode == "RGB"
        except Refused as refusal:
            reasons.add(refusal.reason)
    assert reasons & {"not_an_image", "truncated", "damaged"}
