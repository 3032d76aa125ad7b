"""``sdxl generate`` with a picture to start from, as people run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.generation.metadata import read_record
from sdxl_cli.generation.picture import read_pixels, read_texts
from tests.generation.test_commands import Result

Generate = Callable[..., Result]


@pytest.fixture
def generate(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Generate:
    """The small base, eight steps and seed 5, from ``photo.png`` unless ``photo`` is False."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
    small.resize((100, 70), Image.Resampling.BICUBIC).save("photo.png")
    mask = np.zeros((70, 100), np.uint8)
    mask[20:50, 30:70] = 255
    Image.fromarray(mask).save("mask.png")

    def run(*args: object, photo: bool = True) -> Result:
        start = ["-i", "photo.png"] if photo else []
        base = ["-m", models["base"], "--steps", 8, "--seed", 5, "--scheduler", "sgm"]
        code = cli.run([str(arg) for arg in ("generate", "a red guitar", *base, *start, *args)])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return Result(code, captured.out, captured.err)

    return run


def made(result: Result) -> np.ndarray:
    return read_pixels(result.paths[0])


def test_it_says_how_many_steps_are_run_and_keeps_the_size(generate: Generate) -> None:
    result = generate("--strength", 0.6)
    assert "starts from a picture of 100x70; strength 0.6: 4 of 8 steps" in result.err
    assert "base: 4 steps t=499→124" in result.err
    assert made(result).shape == (70, 100, 3)
    exact = generate("--strength", 0.6, "--exact-steps")
    assert "strength 0.6: exactly 8 steps" in exact.err
    assert "base: 8 steps" in exact.err
    sized = generate("--size", "64x96", "--resize-mode", "fit")
    assert made(sized).shape == (45, 64, 3)


def test_company_and_repetition_change_nothing(generate: Generate) -> None:
    flags = ("--mask", "mask.png", "--sampler", "euler_a" if _has("euler_a") else "euler")
    together = generate(*flags, "--num-images", 3, "--batch-size", 3, "-o", "one").paths
    again = generate(*flags, "--num-images", 3, "-o", "two").paths
    alone = generate(*flags, "--seed", 7, "-o", "three").paths[0]
    assert [path.read_bytes() for path in together] == [path.read_bytes() for path in again]
    assert alone.read_bytes() == together[2].read_bytes()
    assert not np.array_equal(read_pixels(together[0]), read_pixels(together[1]))


def _has(sampler: str) -> bool:
    from sdxl_cli.diffusion.samplers import SAMPLERS

    return sampler in SAMPLERS


@pytest.mark.parametrize("extra", [(), ("--only-masked",), ("--mask-content", "noise", "--strength", 1)])
def test_outside_the_mask_not_one_bit_changes(generate: Generate, extra: tuple[object, ...]) -> None:
    result = made(generate("--mask", "mask.png", *extra))
    outside = np.asarray(Image.open("mask.png")) == 0
    photo = read_pixels(Path("photo.png"))
    assert np.array_equal(result[outside], photo[outside])
    assert (result[~outside] != photo[~outside]).any(axis=1).mean() > 0.9


def test_an_outpainted_picture_contains_the_old_one(generate: Generate) -> None:
    result = generate("--outpaint", "13,0,30,5")
    assert "repaints 34.7 % of 143x75; strength 1: 8 of 8 steps" in result.err
    pixels = made(result)
    assert pixels.shape == (75, 143, 3)
    assert np.array_equal(pixels[:70, 13:113], read_pixels(Path("photo.png")))


def test_it_remembers_what_it_was_made_from_and_is_made_again(
    generate: Generate, capsys: pytest.CaptureFixture[str]
) -> None:
    first = generate("--mask", "mask.png", "--strength", 0.5, "--mask-blur", 2).paths[0]
    parameters = read_texts(first).parameters
    assert "Denoising strength: 0.5, Mask blur: 2" in parameters
    stored = read_record(first)
    assert stored is not None
    assert stored.raw["source"]["name"] == "photo.png"
    assert len(stored.raw["source"]["mask"]["sha256"]) == 64
    assert cli.run(["generate", "--from", str(first), "-o", "again.png"]) == 0
    capsys.readouterr()
    assert Path("again.png").read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["-i", "gone.png"], 3, "gone.png: no such file"),
        (["-i", "photo.png", "--mask", "gone.png"], 3, "gone.png: no such file"),
        (["-i", "photo.png", "--outpaint", "8"], 2, "--outpaint 8: expected"),
        (["--strength", "0.5"], 2, "strength has no meaning without init_img"),
        (["-i", "photo.png", "--strength", "0.01"], 2, "leaves none to run; give at least --strength"),
        (["-i", "photo.png", "--resize-mode", "zoom"], 2, "resize_mode: unknown value 'zoom'"),
        (["-i", "photo.png", "-W", "64"], 2, "--width and --height: with --init-img give both"),
    ],
)
def test_what_cannot_be_is_one_line(
    generate: Generate,
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    words: str,
) -> None:
    assert cli.run(["generate", "x", "-m", str(models["base"]), "--quiet", *flags]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_larger_pictures_are_said_written_down_and_made_again(
    generate: Generate, capsys: pytest.CaptureFixture[str]
) -> None:
    result = generate("--hires-scale", 1.5, "--hires-steps", 2, "--size", "64x96", photo=False)
    assert "then 96x144, base: 2 steps t=" in result.err
    assert made(result).shape == (144, 96, 3)
    parameters = read_texts(result.paths[0]).parameters
    assert "Size: 64x96" in parameters
    words = "Denoising strength: 0.7, Hires upscale: 1.5, Hires steps: 2, Hires upscaler: Latent"
    assert words in parameters
    assert cli.run(["generate", "--from", str(result.paths[0]), "-o", "again.png"]) == 0
    capsys.readouterr()
    assert Path("again.png").read_bytes() == result.paths[0].read_bytes()
    grown = made(generate("--hires-scale", 2, "--hires-steps", 1, "--hires-upscaler", "lanczos"))
    assert grown.shape == (140, 200, 3), "of a picture of 100x70"
