"""The configurations we write build, in diffusers and transformers, the networks of the published files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sdxl_cli.checkpoint.diffusers_config import scheduler_json, tower_json, unet_json, vae_json
from sdxl_cli.checkpoint.diffusers_folder import unet_config, vae_config
from sdxl_cli.model.config import BASE, REFINER, TINY, TINY_REFINER, ModelConfig

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

Shapes = dict[str, tuple[int, ...]]
Manifest = Callable[[str], Shapes]
CONFIGS = [BASE, REFINER, TINY, TINY_REFINER, replace(BASE, unet=replace(BASE.unet, in_channels=9))]


@pytest.mark.parametrize("config", CONFIGS, ids=["base", "refiner", "tiny", "tiny refiner", "inpaint"])
def test_what_is_written_is_read_back(config: ModelConfig) -> None:
    assert unet_config(unet_json(config)) == config.unet
    assert vae_config(vae_json(config.vae, config.native_size)) == config.vae


def shapes(network: Any) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "file"), [(BASE, "diffusers_base_unet"), (REFINER, "diffusers_refiner_unet")]
)
def test_diffusers_builds_the_released_unets(config: ModelConfig, file: str, manifest: Manifest) -> None:
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel.from_config(unet_json(config))
    assert shapes(network) == manifest(file)


def test_diffusers_builds_the_released_autoencoder(manifest: Manifest) -> None:
    with torch.device("meta"):
        network = diffusers.AutoencoderKL.from_config(vae_json(BASE.vae, 1024))
    assert shapes(network) == manifest("diffusers_vae")
    assert network.config.force_upcast
    assert network.config.scaling_factor == 0.13025


@pytest.mark.parametrize(
    ("tower", "name", "file"),
    [
        ("clip_l", "CLIPTextModel", "diffusers_text_encoder"),
        ("big_g", "CLIPTextModelWithProjection", "diffusers_text_encoder_2"),
    ],
)
def test_transformers_builds_the_released_text_encoders(
    tower: str, name: str, file: str, manifest: Manifest
) -> None:
    config = transformers.CLIPTextConfig(**tower_json(getattr(BASE, tower), name))
    with torch.device("meta"):
        network = getattr(transformers, name)(config)
    # transformers 5 leaves "text_model." out of the names of one of the two
    ours = {key.removeprefix("text_model."): shape for key, shape in shapes(network).items()}
    assert ours == {key.removeprefix("text_model."): shape for key, shape in manifest(file).items()}


def test_the_scheduler_is_the_released_one() -> None:
    """Released scheduler_config.json: Euler, leading, offset 1; 30 steps begin 958, 925 (facts.md section 7)."""
    scheduler = diffusers.EulerDiscreteScheduler.from_config(scheduler_json("eps", False))
    scheduler.set_timesteps(30)
    assert scheduler.timesteps[:2].tolist() == [958, 925]
    assert scheduler.timesteps[-1] == 1
    assert float(scheduler.sigmas.max()) < 14.61
    zero = diffusers.EulerDiscreteScheduler.from_config(scheduler_json("v", True))
    zero.set_timesteps(30)
    assert zero.config.prediction_type == "v_prediction"
    assert zero.timesteps[0] == 999
    assert float(zero.sigmas[0]) > 1000
