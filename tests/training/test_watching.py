"""What is seen of a run while it goes: sample pictures, a validation loss, a dry run, another precision."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.batchfile import Line
from sdxl_cli.training.state import load_state
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet, try_unet
from tests.training.files import assert_same_bits, tensors
from tests.training.small import unet_config

LINE = {"prompt": "a red disc", "steps": 2, "width": 64, "height": 64, "sampler": "euler"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_watching_changes_nothing_and_says_what_it_saw(request_: UNetRequest, tmp_path: Path) -> None:
    plain = train_unet(request_)
    sets = {
        "sample_every": 4,
        "validate_every": 3,
        "validate_levels": 2,
        "save_model_every": 4,
        "ema_every": 4,
    }
    watched = train_unet(
        replace(
            request_,
            output=tmp_path / "watched",
            config=unet_config(**{**sets, "ema_every": 1}),
            validation=request_.data,
            sample_lines=(Line("p.txt:1", LINE), Line("p.txt:2", LINE | {"prompt": "blue", "seed": 7})),
        )
    )
    assert_same_bits(tensors(plain.path), tensors(watched.path))
    folder = tmp_path / "watched"
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["000004-0.png", "000004-1.png", "000006-0.png", "000006-1.png", "commands.txt"]
    validated = [line for line in lines(folder / "metrics.jsonl") if "validation_loss" in line]
    assert [line["step"] for line in validated] == [3, 6]
    assert validated[0]["validation_loss"] != validated[1]["validation_loss"]
    # seven pictures at two levels each, spread over both halves
    assert {key for key in validated[0] if key.startswith("validation_mse")} >= {
        "validation_mse_000_099",
        "validation_mse_900_999",
    }
    commands = (folder / "samples" / "commands.txt").read_text().splitlines()
    assert len(commands) == 4
    assert [shlex.split(text, comments=True)[-1] for text in commands] == [
        *[str(folder / "model-000004.safetensors")] * 2,
        *[str(folder / "model.safetensors")] * 2,
    ]


def test_a_sample_is_made_again_by_its_command(
    request_: UNetRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = unet_config(max_steps=1, sample_every=1, save_dtype="fp32")
    train_unet(replace(request_, config=config, sample_lines=(Line("p.txt:1", LINE),)))
    (command,) = (request_.output / "samples" / "commands.txt").read_text().splitlines()
    program, *words = shlex.split(command)
    assert program == "sdxl"
    assert cli.run([*words, "-o", "again.png", "--device", "cpu", "--dtype", "fp32"]) == 0
    first, again = (
        np.asarray(Image.open(path)) for path in (request_.output / "samples" / "000001-0.png", "again.png")
    )
    assert first.std() > 0
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "other.safetensors"}, "p.txt:1: model is not for pictures of the model in training"),
        ({"prompt": ""}, "p.txt:1: has no prompt"),
        ({"seed": -1}, "p.txt:1: seed -1 makes other pictures every time"),
        ({"steps": 0}, "p.txt:1: .*steps 0"),
    ],
)
def test_samples_that_cannot_be_are_refused_before_anything_is_done(
    changes: dict[str, Any], said: str, request_: UNetRequest
) -> None:
    with pytest.raises(UsageError, match=said):
        train_unet(replace(request_, sample_lines=(Line("p.txt:1", LINE | changes),)))
    assert not request_.output.exists()


def test_the_validation_loss_falls_as_pictures_are_learnt_by_heart(request_: UNetRequest) -> None:
    """And is the same number for the same weights: its noise does not depend on the run."""
    config = unet_config(
        max_steps=40, validate_every=20, ema_decay=0.0, text_dropout=0.0, noise_offset=0.0, min_snr_gamma=0.0
    )
    request = replace(request_, config=config, validation=request_.data)
    train_unet(request)
    first, last = (
        line["validation_loss"]
        for line in lines(request.output / "metrics.jsonl")
        if "validation_loss" in line
    )
    assert last < 0.95 * first


def test_a_dry_run_measures_the_largest_size_and_writes_nothing(
    request_: UNetRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = unet_config(batch_size=2, accumulate=3, max_steps=10)
    found = try_unet(replace(request_, config=config, cache=None))
    assert (found.size, found.batch_size, found.batches_per_step) == ("64x64", 2, 3)  # 4096 > 3200 pixels
    assert found.images_per_second == pytest.approx(2 / found.seconds_per_batch)
    assert found.seconds == pytest.approx(30 * found.seconds_per_batch)
    assert found.memory > 100 << 20, "of the process: torch alone takes more"
    assert not request_.output.exists()
    flags = ["--set", "model=small", "--set", "train_text_encoders=true", "--batch-size", "1"]
    unet = ["train-unet", "-d", str(request_.data), "--vae", str(request_.vae), "--dry-run", *flags]
    assert cli.run(unet) == 0
    assert "64x64, batch 1 on cpu:" in capsys.readouterr().out
    vae = ["train-vae", "-d", str(request_.data), "--dry-run", "--json", "--set", "model=small"]
    assert (
        cli.run(
            [*vae, "--set", "crop_sizes=[32, 40]", "--set", "crop_weights=[0.9, 0.1]", "--batch-size", "3"]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert (said["size"], said["batch_size"]) == ("40x40", 16384 // 1600)
    assert not (tmp_path / "runs").exists()


def test_bf16_keeps_weights_and_moments_in_fp32_and_learns_the_same(
    request_: UNetRequest, tmp_path: Path
) -> None:
    config = unet_config(max_steps=2, train_text_encoders=True)
    exact = train_unet(replace(request_, config=config))
    rounded_config = unet_config(max_steps=2, dtype="bf16")
    rounded = train_unet(replace(request_, output=tmp_path / "bf16", config=rounded_config))
    state = load_state(tmp_path / "bf16")[0]
    floating = {value.dtype for value in state.values() if value.is_floating_point()}
    assert floating == {torch.float32}
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert rounded.loss != exact.loss


def test_an_edm_model_is_marked_so_that_nobody_takes_it_for_another(
    request_: UNetRequest, tmp_path: Path
) -> None:
    config = unet_config(objective="edm", prediction="v", min_snr_gamma=0.0, max_steps=2)
    result = train_unet(replace(request_, config=config))
    written = tensors(result.path)
    assert float(written["edm_vpred.sigma_max"]) == 120
    assert float(written["edm_vpred.sigma_min"]) == pytest.approx(0.002)
    with pytest.raises(FileError, match="EDM"):
        locate(str(result.path), "base")
    with pytest.raises(UsageError, match="continuous noise levels"):
        train_unet(replace(request_, output=tmp_path / "s", config=config, sample_lines=(Line("p:1", LINE),)))


def test_pictures_without_captions_are_trained_on_when_that_is_wanted(
    request_: UNetRequest, pictures: Path, tmp_path: Path
) -> None:
    root = tmp_path / "bare"
    root.mkdir()
    for path in pictures.glob("*.png"):
        (root / path.name).write_bytes(path.read_bytes())
    (tmp_path / "b.toml").write_text("[buckets]\nsizes = [[64, 64], [40, 80]]\n")
    bare = tmp_path / "bare.parquet"
    assert cli.run(["bucket-dataset", str(root), "--preset", str(tmp_path / "b.toml"), "-o", str(bare)]) == 0
    config = unet_config(allow_missing_captions=True, max_steps=1)
    assert train_unet(replace(request_, data=bare, config=config)).steps == 1
