"""Timings and previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model
from sdxl_cli.console import half_blocks
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.observe import Step, stage, step
from sdxl_cli.generation.preview import LatentColours, Preview, fit_colours, to_file, to_rows
from sdxl_cli.generation.timings import Timings


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def made(denoised: Tensor, done: int, total: int) -> Step:
    return Step(denoised, "base", done, total, x=denoised + 2, sigma=4.0)


def test_the_noise_of_a_step_is_what_lies_between_x_and_the_picture() -> None:
    assert made(torch.randn(1, 4, 2, 2), 1, 8).eps.flatten().tolist() == pytest.approx([0.5] * 16)


def test_time_in_an_inner_stage_is_not_the_outer_ones() -> None:
    clock = Clock()
    timings = Timings(clock=clock)
    clock.now = 100.0  # before the first stage: nobody's
    with timings.stage("text"):
        clock.now += 1
        with timings.stage("load"):
            clock.now += 10
        clock.now += 2
    clock.now += 50
    with timings.stage("vae"):
        clock.now += 4
    assert timings.seconds == {"text": 3, "load": 10, "vae": 4}
    assert timings.total() == 17


def test_steps_are_timed_one_by_one_without_the_load_before_them() -> None:
    clock = Clock()
    timings = Timings(clock=clock)
    for seconds in ((1.0, 2.0), (5.0,)):
        with timings.stage("unet"):
            with timings.stage("load"):
                clock.now += 30
            for step_seconds in seconds:
                clock.now += step_seconds
                timings.step()
    assert timings.steps == [1.0, 2.0, 5.0]
    assert timings.to_json()["steps"] == {"count": 3, "mean": 2.66667, "min": 1.0, "max": 5.0}
    assert timings.to_json()["total"] == 68


def test_who_does_not_look_on_is_not_told() -> None:
    with stage(object(), "text"):
        step(object(), made(torch.zeros(1, 4, 2, 2), 1, 1))


@pytest.fixture(scope="module")
def vae() -> Any:
    files = locate("bundled")
    kind = {"dtype": torch.float32, "vae_dtype": torch.float32, "device": torch.device("cpu")}
    return load_model(files, ("vae",), **kind).vae  # type: ignore[arg-type]


def test_the_map_shows_pictures_it_was_not_fitted_to(vae: Any) -> None:
    """Against the pictures themselves, made small: PSNR above 18 dB, which a wrong bias alone costs."""
    colours = fit_colours(vae)
    factor = vae.config.downsampling
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    disc = torch.where((x**2 + y**2 < 0.5)[None], torch.tensor([0.8, -0.6, 0.1])[:, None, None], 0.9)
    ramp = torch.stack([x, y, -x * y])
    for picture in (disc, ramp):
        with torch.inference_mode():
            shown = colours(vae.to_latent(vae.encode(picture[None]).mode()))
        small = torch.nn.functional.avg_pool2d(picture[None], factor)[0].permute(1, 2, 0)
        truth = ((small + 1) * 127.5).numpy()
        error = ((shown - truth) ** 2).mean()
        assert shown.shape == truth.shape
        assert 10 * np.log10(255**2 / error) > 18
        assert error < ((truth - truth.mean((0, 1))) ** 2).mean() / 4


def test_the_map_is_the_same_every_time(vae: Any) -> None:
    first, second = fit_colours(vae), fit_colours(vae)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_every_nth_step_and_the_last_are_shown_side_by_side() -> None:
    identity = LatentColours(torch.eye(4)[:, :3], torch.zeros(3))
    shown: list[Any] = []
    preview = Preview(identity, shown.append, interval=3)
    for done in range(1, 9):
        preview.step(made(torch.full((2, 4, 2, 3), done / 8), done, 8))
    assert [pixels[0, 0, 0] for pixels in shown] == [round((n / 8 + 1) * 127.5) for n in (3, 6, 8)]
    assert shown[0].shape == (2, 6, 3)


def test_a_preview_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    show = to_file(tmp_path / "preview.png")
    for level in (10, 200):
        show(np.full((8, 16, 3), level, np.uint8))
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["preview.png"]
        assert np.asarray(Image.open(tmp_path / "preview.png")).max() == level
    assert Image.open(tmp_path / "preview.png").size == (1024, 512)
    with pytest.raises(UsageError, match="unknown picture format"):
        to_file(tmp_path / "preview.bmpp")


def test_a_terminal_shows_two_rows_a_line() -> None:
    rows = to_rows(np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3))
    text = half_blocks(rows)
    assert text.plain == "▀▀▀▀\n▀▀▀▀\n"
    first = text.spans[1].style
    assert (first.color.triplet, first.bgcolor.triplet) == ((3, 4, 5), (15, 16, 17))  # type: ignore[union-attr]
    assert len(to_rows(np.zeros((100, 200, 3), np.uint8))) == 32
