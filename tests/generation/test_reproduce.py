"""``sdxl reproduce`` and ``sdxl inspect-image``, as people run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdxl_cli import cli
from sdxl_cli.generation.picture import read_pixels, read_texts, write_picture
from sdxl_cli.generation.reproduce import compare


class Result(NamedTuple):
    code: int
    out: str
    err: str


Sdxl = Callable[..., Result]


@pytest.fixture
def sdxl(capsys: pytest.CaptureFixture[str]) -> Sdxl:
    def run(*args: object) -> Result:
        code = cli.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def made(sdxl: Sdxl, models: dict[str, Path]) -> Callable[..., Path]:
    """A picture by ``sdxl generate`` with the small base."""

    def make(*args: object) -> Path:
        always = ("generate", "a red guitar", "-m", models["base"], "--steps", 2, "--seed", 5)
        result = sdxl(*always, *args)
        assert result.code == 0, result.err
        return Path(result.out.strip())

    return make


def rewritten(
    path: Path, change: Callable[[dict[str, object]], None] = lambda record: None, shift: int = 0
) -> Path:
    """The picture with another record, or with its last pixel one level off."""
    texts, pixels = read_texts(path), read_pixels(path).copy()
    record = json.loads(texts.record)
    change(record)
    pixels[-1, -1, 1] ^= shift
    new = path.with_name(f"changed-{path.name}")
    write_picture(new, pixels, replace(texts, record=json.dumps(record)))
    return new


def test_two_pictures_are_compared_pixel_by_pixel() -> None:
    one = np.zeros((4, 5, 3), np.uint8)
    other = one.copy()
    other[2, 3] = (0, 7, 1)
    other[3, 0] = (2, 0, 0)
    found = compare(one, other)
    assert (found.identical, found.first, found.values) == (False, (2, 3), ((0, 0, 0), (0, 7, 1)))
    assert (found.differing, found.largest) == (2, 7)
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / ((49 + 1 + 4) / 60)))
    assert compare(one, one).identical
    assert str(compare(one, one[:3])) == "another size: 5x4 in the picture, 5x3 now"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_of_every_format_is_made_again_exactly(
    made: Callable[..., Path], sdxl: Sdxl, suffix: str
) -> None:
    result = sdxl("reproduce", made("-o", f"a.{suffix}"))
    assert (result.code, result.out) == (0, "identical: every pixel of 64x64\n")


def test_the_first_pixel_that_differs_is_named(made: Callable[..., Path], sdxl: Sdxl) -> None:
    path = rewritten(made(), shift=1)
    result = sdxl("reproduce", path)
    assert result.code == 1
    assert "the first is row 63, column 63" in result.out
    assert "first difference: none in the settings" in result.err
    found = json.loads(sdxl("reproduce", path, "--json", "-q").out)
    assert (found["identical"], found["comparison"]["differing"], found["differences"]) == (False, 1, [])


def test_a_changed_setting_another_model_and_another_version_are_named(
    made: Callable[..., Path], sdxl: Sdxl, models: dict[str, Path]
) -> None:
    same = sdxl("reproduce", made(), "-m", models["pruned"])  # the same weights, less of the vocabulary
    assert (same.code, "models.base.sha256" in same.out) == (0, True)
    other = sdxl("reproduce", made(), "--vae", models["refiner"])
    assert other.code == 1
    assert "first difference: models.vae.name: it does not say in the picture, refiner now" in other.err

    def age(record: dict[str, object]) -> None:
        record["sdxl"] = "0.0.1"
        record["run"]["torch"] = "1.13"  # type: ignore[index]
        del record["request"]["clip_skip"]  # type: ignore[attr-defined]

    old = sdxl("reproduce", rewritten(made(), age))
    assert old.code == 0
    assert [line.split()[0] for line in old.out.splitlines()[1:-1]] == ["run.torch", "sdxl"]


def test_pictures_made_from_pictures_look_for_them(
    made: Callable[..., Path], sdxl: Sdxl, models: dict[str, Path]
) -> None:
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 90).convert("RGB").save("start.png")
    path = made("--init-img", "start.png", "--strength", 0.9)
    assert sdxl("reproduce", path).code == 0
    Path("start.png").rename("outputs/start.png")
    assert sdxl("reproduce", path).code == 0
    Image.new("RGB", (64, 64)).save("outputs/start.png")
    result = sdxl("reproduce", path)
    assert result.code == 3
    assert "start.png: is not the file" in result.err
    Path("outputs/start.png").unlink()
    assert "was made from start.png, which is neither here nor beside it" in sdxl("reproduce", path).err


def test_refined_pictures_too(made: Callable[..., Path], sdxl: Sdxl, models: dict[str, Path]) -> None:
    first = made()
    refined = sdxl("refine", first, "-m", models["refiner"], "--seed", 3, "--steps", 8, "-o", "outputs")
    assert refined.code == 0
    assert sdxl("reproduce", refined.out.strip()).code == 0


def test_the_new_picture_can_be_kept(made: Callable[..., Path], sdxl: Sdxl) -> None:
    path = made()
    assert sdxl("reproduce", path, "-o", "again.png").code == 0
    assert np.array_equal(read_pixels(Path("again.png")), read_pixels(path))
    result = sdxl("reproduce", path, "-o", "again.png")
    assert (result.code, "there already" in result.err) == (2, True)


def test_a_picture_that_says_nothing(sdxl: Sdxl) -> None:
    Image.new("RGB", (8, 8)).save("a.png")
    result = sdxl("reproduce", "a.png")
    assert (result.code, result.out) == (2, "")
    assert "does not say how it was made" in result.err
    assert "by nobody who says so" in sdxl("inspect-image", "a.png").out


def test_inspecting_our_own_picture(made: Callable[..., Path], sdxl: Sdxl) -> None:
    path = made("--cfg-scale", 3, "-o", "a.jpg")
    out = sdxl("inspect-image", path).out
    assert out.startswith("a.jpg: JPEG, 64x64, by sdxl generate\n")
    for words in ("a red guitar", "cfg_scale", "base model", "fp32"):
        assert words in out
    assert "crop_top_left" not in out
    assert "crop_top_left" in sdxl("inspect-image", path, "--all").out
    (found,) = json.loads(sdxl("inspect-image", path, "--json").out)["pictures"]
    assert found["record"]["request"]["cfg_scale"] == 3.0
    assert found["settings"]["steps"] == 2
    assert found["texts"]["parameters"] == read_texts(path).parameters
    assert read_texts(path).parameters in sdxl("inspect-image", path, "--raw").out


def test_inspecting_somebody_elses(sdxl: Sdxl) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters", "a cat\nSteps: 3, Sampler: Euler, Seed: 1, NGMS: 2, Model: m, Model hash: 0011223344"
    )
    Image.new("RGB", (8, 16)).save("a.png", pnginfo=info)
    out = sdxl("inspect-image", "a.png").out
    assert out.startswith("a.png: PNG, 8x16, by A1111\n")
    assert "m [0011223344]" in out
    assert "not taken over: NGMS: 2: has no counterpart here" in out
