from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.checkpoint.write import save_model, save_vae
from sdxl_cli.metrics.lpips import LPIPS
from sdxl_cli.model.config import VAEConfig
from sdxl_cli.model.vae import Autoencoder
from tests.generation.conftest import BASE, random_model
from tests.metrics.networks import random_inception, write_clip

SMALL = VAEConfig(channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=2, scale_factor=0.5)


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything in a folder of the test's own, and nothing in any cache."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(random_inception().net.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk of AlexNet as torchvision names it, and heads as lpips does, in one file."""
    torch.manual_seed(0)
    names = {}
    for name, tensor in LPIPS("alex").state_dict().items():
        part, _, rest = name.partition(".")
        names[f"features.{rest}" if part == "trunk" else f"lin{rest}.model.1.weight"] = tensor
    path = tmp_path_factory.mktemp("lpips") / "lpips.pth"
    torch.save(names, path)
    return path


@pytest.fixture(scope="session")
def vae() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(SMALL).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vae_file(vae: Autoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "small.safetensors"
    save_vae(path, vae, SMALL)
    return path


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, random_model(BASE, 0), BASE)
    return path


def draw(folder: Path, count: int, seed: int, size: tuple[int, int] = (72, 80)) -> Path:
    """Blurry coloured pictures, (height, width), some darker by ``seed``."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = rng.integers(0, 256 - 60 * seed, (5, 6, 3), np.uint8)
        image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
        image.save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of pictures, 6 and 5."""
    folder = tmp_path_factory.mktemp("sets")
    return draw(folder / "one", 6, 0), draw(folder / "other", 5, 1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs ``sdxl eval`` with ``--json`` and gives what it printed."""

    def call(*args: object) -> dict[str, Any]:
        capsys.readouterr()
        code = cli.run(["eval", *map(str, args), "--json", "--device", "cpu"])
        out = capsys.readouterr()
        assert code == 0, out.err
        found: dict[str, Any] = json.loads(out.out)
        return found

    return call


def scores(content: dict[str, Any], row: int = 0) -> dict[str, dict[str, Any]]:
    return {score["metric"]: score for score in content["results"][row]["scores"]}
