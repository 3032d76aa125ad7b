"""Small random models, written to disk as any checkpoint is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.model.config import TINY, TINY_REFINER, ModelConfig
from sdxl_cli.model.sdxl import SDXL

KNOWN_TEXT = "a red guitar on a blue table ,"

_SMALL = {"model_channels": 32, "num_head_channels": 32}
BASE = replace(TINY, unet=replace(TINY.unet, **_SMALL), native_size=64)
REFINER = replace(TINY_REFINER, unet=replace(TINY_REFINER.unet, **_SMALL), native_size=64)


def random_model(config: ModelConfig, seed: int) -> SDXL:
    torch.manual_seed(seed)
    return SDXL(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of a base, a refiner, and a base that knows only the words of ``KNOWN_TEXT``."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "base.safetensors", random_model(BASE, 0), BASE)
    save_model(folder / "refiner.safetensors", random_model(REFINER, 1), REFINER)
    words = sorted({*Tokenizer.default().encode(KNOWN_TEXT), 0, 49406, 49407})
    save_model(folder / "pruned.safetensors", random_model(BASE, 0), BASE, keep_token_ids=words)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a base with NaN in one parameter."""
    folder = tmp_path_factory.mktemp("broken")

    def write(parameter: str) -> Path:
        state: dict[str, Tensor] = random_model(BASE, 0).state_dict()
        state[parameter].fill_(float("nan"))
        save_model(folder / f"{parameter}.safetensors", state, BASE)
        return folder / f"{parameter}.safetensors"

    return write


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write into their own folder, and remember hashes there."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
