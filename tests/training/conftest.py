"""Networks that train in milliseconds, and a few pictures to train them on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.checkpoint.write import save_model, save_vae
from sdxl_cli.model.config import CONFIGS
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.growing import initialize
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from sdxl_cli.training.vae_run import VAERequest, train_vae
from tests.training.files import Train
from tests.training.small import SMALL, SMALL_REFINER, unet_config, vae_config

COLOURS = {"red": (220, 40, 30), "green": (40, 180, 60), "blue": (40, 60, 210), "yellow": (230, 210, 40)}


@pytest.fixture(autouse=True, scope="session")
def _small_configs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "small", SMALL)
        patch.setitem(CONFIGS, "small-refiner", SMALL_REFINER)
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven squares and wide pictures of a coloured disc, with captions."""
    root = tmp_path_factory.mktemp("pictures")
    rows = []
    for index in range(7):
        height, width = [(64, 64), (48, 96)][index % 3 == 2]
        name = list(COLOURS)[index % 4]
        y, x = np.mgrid[:height, :width]
        pixels = np.full((height, width, 3), 250, np.uint8)
        pixels[(y - height / 2) ** 2 + (x - width / 2) ** 2 < (12 + index) ** 2] = COLOURS[name]
        Image.fromarray(pixels).save(root / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "texts": [f"a {name} disc", name]})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="session")
def manifest(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``sdxl bucket-dataset`` makes of the pictures."""
    folder = tmp_path_factory.mktemp("manifest")
    preset = folder / "buckets.toml"
    preset.write_text("[buckets]\nsizes = [[64, 64], [40, 80]]\n")
    path = folder / "m.parquet"
    assert cli.run(["bucket-dataset", str(pictures), "--preset", str(preset), "-o", str(path), "-q"]) == 0
    return path


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random autoencoder, saved."""
    torch.manual_seed(0)
    vae = Autoencoder(SMALL.vae)
    initialize(vae)
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_vae(path, vae, SMALL.vae)
    return path


@pytest.fixture(scope="session")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base that knows every token."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_model(path, SDXL(SMALL), SMALL)
    return path


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that runs share, so that pictures are encoded once."""
    return tmp_path_factory.mktemp("latents")


@pytest.fixture
def request_(manifest: Path, vae_file: Path, latents: Path, tmp_path: Path) -> UNetRequest:
    """Six steps of a U-Net and its text encoders from nothing."""
    return UNetRequest(
        data=manifest,
        output=tmp_path / "run",
        config=unet_config(),
        vae=str(vae_file),
        cache=latents,
    )


@pytest.fixture
def vae_request(manifest: Path, tmp_path: Path) -> VAERequest:
    return VAERequest(data=(manifest,), output=tmp_path / "run", config=vae_config())


@pytest.fixture(params=["vae", "unet"])
def train(request: pytest.FixtureRequest, vae_request: VAERequest, request_: UNetRequest) -> Train:
    def run(folder: Path, steps: int, resume: bool) -> Path:
        # the falling end of the rate depends on the number of steps; both halves must have the same
        asked: Any = vae_request if request.param == "vae" else request_
        make: Any = vae_config if request.param == "vae" else unet_config
        optimizer = replace(asked.config.loop.optimizer, decay_steps=0)
        config = make(max_steps=steps, optimizer=optimizer)
        asked = replace(asked, output=folder, config=config, resume=resume)
        return (train_vae if request.param == "vae" else train_unet)(asked).path

    return run


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
