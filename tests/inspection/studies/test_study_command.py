"""``sdxl study`` from its flags to its files, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model, load_vae
from sdxl_cli.data.loader import to_tensor
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.inspection.studies.levels import grid_places, spread_levels
from sdxl_cli.model.conditioning import MicroConditioning, condition
from sdxl_cli.training.losses import add_noise

QUICK = ["--model", "bundled", "--steps", "2", "-q", "--json"]


def study(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert cli.run(["study", *QUICK, *args]) == 0
    return json.loads(capsys.readouterr().out)


def shows(grid: np.ndarray[Any, Any], cell: np.ndarray[Any, Any]) -> bool:
    """Whether a picture is in a larger one, pixel by pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(grid, (1, cell.shape[1], 3))[:, :, 0, 0]
    tops, lefts = np.nonzero((windows == cell[0]).all(axis=(2, 3)))
    height, width = cell.shape[:2]
    pairs = zip(tops, lefts, strict=True)
    return any(np.array_equal(grid[y : y + height, x : x + width], cell) for y, x in pairs)


def test_a_study_leaves_a_grid_a_report_and_pictures_that_can_be_made_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = [
        "size",
        "-p",
        "a cat",
        "--size",
        "64x64",
        "--values",
        "32x32",
        "--values",
        "256x256",
        "-o",
        "out",
    ]
    made = study(capsys, *flags)
    assert [Path(f).name for f in made["files"]] == ["grid.png", "study.json", "report.html"]
    assert [row[0] for row in made["outcome"]["table"]] == ["32x32", "256x256"]
    grid = np.asarray(Image.open("out/grid.png"))
    for column in (0, 1):
        assert shows(grid, np.asarray(Image.open(f"out/pictures/row00-column0{column}.png")))
    same = ["-s", "0", "--size", "64x64", "--original-size", "256x256", "--steps", "2", "--model", "bundled"]
    assert cli.run(["generate", "a cat", *same, "-q", "-o", "again.png"]) == 0
    again, second = (np.asarray(Image.open(p)) for p in ("again.png", "out/pictures/row00-column01.png"))
    np.testing.assert_array_equal(again, second)
    assert cli.run(["reproduce", "out/pictures/row00-column01.png", "-q"]) == 0
    # nothing is overwritten
    assert cli.run(["study", *QUICK, *flags]) == 3


def test_the_refiner_comes_from_the_family_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    made = study(capsys, "refiner", "-p", "a cat", "--size", "64x64", "--steps", "6")
    assert made["request"]["refiner"] == "bundled"
    assert made["pictures"] == 3
    assert made["outcome"]["table"][0][2] == 1
    assert Path("studies/refiner/grid.png").is_file()


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((160, 128), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a cat")
    return folder


def by_hand(data: Path) -> tuple[torch.Tensor, MicroConditioning]:
    """The first picture's middle square at the native side, and what the model is told of it."""
    side = locate("bundled", "base").config.native_size
    width = round(160 * side / 128)
    left = (width - side) // 2
    whole = Image.open(data / "0.png").resize((width, side), Image.Resampling.LANCZOS)
    image = to_tensor(np.array(whole.crop((left, 0, left + side, side))))
    return image, MicroConditioning(
        original_size=(128, 160), crop_top_left=(0, left), target_size=(side, side)
    )


def test_the_loss_of_a_level_is_that_of_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    flags = ["--data", str(data), "--images", "1", "--levels", "4", "-o", "out"]
    table = study(capsys, "levels", *flags)["outcome"]["table"]
    assert [row[0] for row in table] == spread_levels(4) == [125, 375, 625, 875]
    image, micro = by_hand(data)
    vae = load_vae(locate("bundled", "base"), dtype=torch.float32)
    ids = [torch.tensor([Tokenizer.default().row("a cat", padding)]) for padding in (49407, 0)]
    for column, role in ((2, "base"), (4, "refiner")):
        files = locate("bundled", role)  # type: ignore[arg-type]
        model = load_model(files, ("unet", "text"), dtype=torch.float32, vae_dtype=torch.float32)
        with torch.no_grad():
            z = vae.to_latent(vae.encode(image[None]).mode())
            cond = condition(model.config, model.conditioner.text(*ids), [micro])
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
            for row in table:
                index = torch.tensor([row[0]])
                noised = add_noise(z, noise, NoiseSchedule().sigmas[index], files.prediction, 0.0)
                output = model.unet(noised.network_input, index, cond.crossattn, cond.vector)
                loss = float((output - noised.target).square().mean())
                # of the noise that a v model's answer implies: v is off by the noise's error times sqrt(sigma² + 1)
                implied = loss / (row[1] ** 2 + 1) if files.prediction == "v" else loss
                assert row[column] == pytest.approx(implied, rel=2e-3)
    assert Path("out/report.html").read_text(encoding="utf-8").count("<polyline") == 2
    assert len(list(Path("out/pictures").iterdir())) == 2 * (1 + 4)


def test_levels_on_the_grid_are_the_first_the_last_and_some_between() -> None:
    places = spread_levels(20)
    assert (places[0], places[-1]) == (25, 975)
    shown = grid_places(places)
    assert (shown[0], shown[-1], len(shown)) == (25, 975, 7)
    assert grid_places([500]) == [500]


def test_without_a_name_the_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study", "--json"]) == 0
    listed = [row["study"] for row in json.loads(capsys.readouterr().out)]
    assert listed == ["size", "crop", "aspect", "refiner", "levels"]


@pytest.mark.parametrize(
    ("args", "says", "code"),
    [
        (["sizes"], "did you mean size", 2),
        (["levels"], "--data: this study looks at pictures", 2),
        (["size", "--data", "x"], "--data: the study size makes its own", 2),
        (["aspect", "--size", "64x64"], "--size: the study of formats", 2),
        (["refiner", "--values", "1"], "--values: the study refiner has none", 2),
        (["size", "--values", "big"], "--values big: expected WIDTHxHEIGHT", 2),
        (["levels", "--data", "nowhere"], "nowhere", 3),
    ],
)
def test_what_makes_no_study_is_said(
    args: list[str], says: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["study", *args, "--model", "bundled"]) == code
    assert says in capsys.readouterr().err
