from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_cli import console as consoles
from sdxl_cli.checkpoint.write import save_tensors, save_vae
from sdxl_cli.model.config import VAEConfig
from sdxl_cli.model.vae import Autoencoder

SMALL = VAEConfig(channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=2, scale_factor=0.5)


@pytest.fixture(scope="session")
def vae() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(SMALL).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vae_file(vae: Autoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "small.safetensors"
    save_vae(path, vae, SMALL)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures; the sides of one are no multiples of 8."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (32, 48)), ("b.png", (64, 64)), ("c.jpg", (45, 37))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def latents(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors as a safetensors file."""

    def write(name: str = "latents", **tensors: torch.Tensor) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_tensors(path, tensors)
        return path

    return write


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write into their own folder, and say what they have to say, whatever ran before them."""
    consoles.configure()
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
