"""Small models and the key lists of the published files."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdxl_cli.model.config import ModelConfig, TextTowerConfig, UNetConfig, VAEConfig
from sdxl_cli.model.sdxl import SDXL

Shapes = dict[str, tuple[int, ...]]
MANIFESTS = Path(__file__).parent / "manifests"

SMALL = ModelConfig(
    unet=UNetConfig(
        model_channels=16,
        num_res_blocks=1,
        transformer_depth=(0, 1, 2),
        transformer_depth_middle=2,
        num_head_channels=8,
        context_dim=80,
        adm_in_channels=48 + 6 * 32,
        norm_groups=4,
    ),
    vae=VAEConfig(channels=16, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4, scale_factor=0.5),
    clip_l=TextTowerConfig(
        width=32, layers=3, heads=2, activation="quick_gelu", embed_dim=32, vocab_size=120
    ),
    big_g=TextTowerConfig(width=48, layers=3, heads=3, activation="gelu", embed_dim=48, vocab_size=120),
    scalars=("original_size", "crop_top_left", "target_size"),
    scalar_dim=32,
    native_size=64,
)
SMALL_REFINER = replace(
    SMALL,
    unet=replace(
        SMALL.unet,
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(0, 1, 1, 0),
        transformer_depth_middle=1,
        context_dim=48,
        adm_in_channels=48 + 5 * 32,
    ),
    clip_l=None,
    scalars=("original_size", "crop_top_left", "aesthetic_score"),
)


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    return SMALL


@pytest.fixture(scope="session")
def small_refiner_config() -> ModelConfig:
    return SMALL_REFINER


@pytest.fixture
def random_model() -> Callable[[ModelConfig], SDXL]:
    """Weights that differ in every tensor: fresh models have biases of 0 and norms of 1."""

    def build(config: ModelConfig) -> SDXL:
        torch.manual_seed(0)
        model = SDXL(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], Shapes]:
    """The shapes of a published file."""
    return lambda name: {key: shape for key, (_, shape) in _read(name).items()}


@pytest.fixture(scope="session")
def manifest_dtypes() -> Callable[[str], dict[str, str]]:
    """The dtypes of a published file."""
    return lambda name: {key: dtype for key, (dtype, _) in _read(name).items()}


def _read(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for line in gzip.decompress((MANIFESTS / f"{name}.txt.gz").read_bytes()).decode().splitlines():
        key, dtype, shape = line.split(" ")
        found[key] = (dtype, tuple(map(int, filter(None, shape.split("x")))))
    return found
