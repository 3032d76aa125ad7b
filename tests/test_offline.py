"""The network is for ``sdxl download`` alone: with every socket blocked, all other commands do their work."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.generation.latents import save_latents
from sdxl_cli.generation.picture import read_texts

TRAINING = ["--set", "model=tiny", "--set", "loop.max_steps=1", "--set", "loop.batch_size=1"]
AS_BUNDLED = ["--set", "prediction=v", "--set", "zero_terminal_snr=false"]
COMMANDS: dict[str, list[str]] = {
    "generate": ["a red cup", "--model", "bundled", "--steps", "1", "--size", "128x128", "-o", "made.png"],
    "refine": ["made.png", "--refiner", "bundled", "--steps", "2", "--strength", "0.9", "-o", "refined"],
    "bench": ["--model", "bundled", "--size", "64x64", "--only", "unet", "--repeats", "1"],
    "decode": ["made.latents.safetensors", "--model", "bundled", "-o", "decoded.png"],
    "inspect-image": ["made.png"],
    "reproduce": ["made.png", "--model", "bundled"],
    "samplers": [],
    "bucket-dataset": ["pictures", "--preset", "buckets.toml", "-o", "data.parquet"],
    "cache-dataset": ["data.parquet", "-o", "cache", "--model", "bundled"],
    "inspect-latents": ["pictures", "--vae", "bundled"],
    "study": ["size", "-p", "a cup", "--values", "64x64", "--model", "bundled", "--steps", "1"],
    "eval": ["reconstruction", "pictures", "--vae", "bundled", "--metrics", "psnr,ssim", "-o", "quality"],
    "train-vae": [
        "-d",
        "data.parquet",
        "-o",
        "vae",
        *TRAINING,
        "--set",
        "crop_sizes=[32]",
        "--set",
        "crop_weights=[1]",
    ],
    "train-unet": ["-d", "data.parquet", "-o", "unet", *TRAINING, *AS_BUNDLED, "--init", "bundled"],
    "train-embedding": [
        "-d",
        "data.parquet",
        "-o",
        "word",
        "--word",
        "xcup",
        "--model",
        "bundled",
        "--max-steps",
        "1",
    ],
    "convert": ["bundled", "folder"],
    "inspect-checkpoint": ["folder"],
}
"""Every command with something to do, in an order in which each finds what it needs."""


@pytest.fixture
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no caches, and a folder with pictures."""

    def refused(*args: object, **options: object) -> None:
        raise AssertionError(f"the network is wanted: {args}")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refused)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "buckets.toml").write_text("[buckets]\nsizes = [[64, 64]]\n")
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text("a red cup")


def test_every_command_is_in_the_table() -> None:
    """A new command adds its row above."""
    assert set(COMMANDS) == set(cli.command_names()) - {"download"}


@pytest.mark.slow
@pytest.mark.usefixtures("_nowhere")
def test_commands_work_without_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    for name, args in COMMANDS.items():
        if name == "decode":  # what generate leaves behind when memory runs out
            save_latents(Path(), "made", torch.zeros(1, 4, 16, 16), read_texts(Path("made.png")))
        code = cli.run([name, *args])
        captured = capsys.readouterr()
        assert code == 0, f"{name}: {captured.err}"


@pytest.mark.usefixtures("_nowhere")
def test_only_the_download_tries(capsys: pytest.CaptureFixture[str]) -> None:
    """The block is felt: without it the test above would mean nothing."""
    with pytest.raises(AssertionError, match="the network is wanted"):
        cli.run(["download", "base"])
