"""The model that comes with the program: there, small enough, whole, and showing what it is asked for."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.checkpoint.locate import BUNDLED, locate

LARGEST = 48_000_000
"""Bytes of everything together."""


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


def picture(prompt: str, capsys: pytest.CaptureFixture[str], *flags: str) -> np.ndarray:
    """RGB [H, W, 3] of ``sdxl generate PROMPT`` without a model."""
    assert cli.run(["generate", prompt, "--seed", "0", "--steps", "20", "-o", "out", *flags]) == 0
    (path,) = capsys.readouterr().out.split()
    return np.asarray(Image.open(path).convert("RGB"))


def hue_of_the_thing(pixels: np.ndarray) -> float:
    """Mean hue, 0 … 1, of the strongly coloured pixels, weighted by how coloured they are."""
    rgb = pixels.reshape(-1, 3) / 255.0
    strength = rgb.max(1) - rgb.min(1)
    assert (strength > 0.35).mean() > 0.03, "there is next to nothing coloured in the picture"
    angles = np.array([colorsys.rgb_to_hsv(*colour)[0] for colour in rgb[strength > 0.35]]) * 2 * np.pi
    weights = strength[strength > 0.35]
    return float(np.angle((weights * np.exp(1j * angles)).sum()) / (2 * np.pi) % 1.0)


def distance(one: float, other: float) -> float:
    """Between hues on the circle, 0 … 0.5."""
    return abs((one - other + 0.5) % 1.0 - 0.5)


def test_all_files_together_are_small() -> None:
    files = [path for path in BUNDLED.iterdir() if path.is_file()]
    assert {"base.safetensors", "refiner.safetensors", "LICENSES.md"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= LARGEST


def test_the_bundled_models_are_a_base_and_a_refiner_of_the_same_latents() -> None:
    base, refiner = locate("bundled"), locate("bundled", "refiner")
    assert (base.identity.kind, refiner.identity.kind) == ("base", "refiner")
    assert base.is_bundled
    assert base.config.vae == refiner.config.vae
    assert base.config.big_g == refiner.config.big_g


def test_the_refiner_takes_over(capsys: pytest.CaptureFixture[str]) -> None:
    alone = picture("a strawberry", capsys)
    refined = picture("a strawberry", capsys, "--refiner", "bundled")
    assert not np.array_equal(alone, refined)
    assert np.abs(alone.astype(float) - refined).mean() < 30, "it changes details, not the picture"


@pytest.mark.parametrize(
    ("prompt", "hue"),
    [("a red heart", 0.98), ("a banana", 0.13), ("a green apple", 0.27), ("a blue car", 0.61)],
)
def test_things_have_the_colour_they_are_asked_for(
    prompt: str, hue: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distance(hue_of_the_thing(picture(prompt, capsys)), hue) < 0.12


@pytest.mark.parametrize(("colour", "rgb"), [("blue", (38, 82, 220)), ("yellow", (252, 216, 52))])
def test_the_ground_has_the_colour_it_is_asked_for(
    colour: str, rgb: tuple[int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = picture(f"a cat on a {colour} background", capsys)
    corners = np.stack([pixels[:8, :8], pixels[:8, -8:], pixels[-8:, :8], pixels[-8:, -8:]])
    assert np.abs(corners.reshape(-1, 3).mean(0) - rgb).max() < 60


def test_a_word_it_never_saw_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "a zeppelin", "--seed", "0", "--steps", "2", "-o", "out"]) == 0
    assert "never saw the word zeppelin" in capsys.readouterr().err


def test_prompts_make_different_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (picture(f"a {thing}", capsys).astype(float) for thing in ("banana", "red heart"))
    assert np.abs(one - other).mean() > 10
