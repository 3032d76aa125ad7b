"""Names and shapes of the original single file and of diffusers folders, against the published files' lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sdxl_cli.checkpoint.layouts import (
    Plan,
    big_g_to_diffusers,
    big_g_to_original,
    clip_l_to_diffusers,
    clip_l_to_original,
    unet_to_diffusers,
    unet_to_original,
    vae_to_diffusers,
    vae_to_original,
)
from sdxl_cli.model.config import BASE, REFINER, ModelConfig, UNetConfig
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.unet import UNet

Shapes = dict[str, tuple[int, ...]]
Manifest = Callable[[str], Shapes]
OPTIONAL = (".position_ids", "logit_scale")


def below(shapes: Shapes, prefix: str) -> Shapes:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def applied(plan: Plan, shapes: Shapes) -> Shapes:
    return {name: source.shape(shapes) for name, source in plan.items()}


def needed(shapes: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.endswith(OPTIONAL)}


@pytest.mark.parametrize(
    ("config", "file"), [(BASE, "sd_xl_base_1.0"), (REFINER, "sd_xl_refiner_1.0")], ids=["base", "refiner"]
)
def test_the_networks_have_the_tensors_of_the_released_files(
    config: ModelConfig, file: str, manifest: Manifest
) -> None:
    with torch.device("meta"):
        model = SDXL(config)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert needed(ours) == needed(manifest(file))
    assert ours.keys() <= manifest(file).keys()


def test_the_vae_alone_has_the_tensors_of_the_released_file(manifest: Manifest) -> None:
    with torch.device("meta"):
        vae = SDXL(BASE, ("vae",)).vae
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == manifest("sdxl_vae")


@pytest.mark.parametrize(
    ("config", "single", "folder"),
    [
        (BASE.unet, "sd_xl_base_1.0", "diffusers_base_unet"),
        (REFINER.unet, "sd_xl_refiner_1.0", "diffusers_refiner_unet"),
    ],
    ids=["base", "refiner"],
)
def test_unet_names_both_ways(config: UNetConfig, single: str, folder: str, manifest: Manifest) -> None:
    original = below(manifest(single), "model.diffusion_model.")
    diffusers = manifest(folder)
    assert applied(unet_to_original(diffusers, config), diffusers) == original
    assert applied(unet_to_diffusers(original, config), original) == diffusers


def test_vae_names_both_ways(manifest: Manifest) -> None:
    original, diffusers = manifest("sdxl_vae"), manifest("diffusers_vae")
    assert applied(vae_to_original(diffusers, BASE.vae), diffusers) == original
    assert applied(vae_to_diffusers(original, BASE.vae), original) == diffusers


def test_vae_attention_names_of_2022(manifest: Manifest) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(key: str) -> str:
        for new, was in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        return key

    diffusers = {renamed(key): shape for key, shape in manifest("diffusers_vae").items()}
    assert any(".query." in key for key in diffusers)
    assert applied(vae_to_original(diffusers, BASE.vae), diffusers) == manifest("sdxl_vae")


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["as in files", "as in transformers 5"])
def test_clip_l_names_both_ways(prefix: str, manifest: Manifest) -> None:
    original = below(manifest("sd_xl_base_1.0"), "conditioner.embedders.0.transformer.")
    diffusers = manifest("diffusers_text_encoder")
    given = {key.replace("text_model.", prefix, 1): shape for key, shape in diffusers.items()}
    assert applied(clip_l_to_original(given), given) == needed(original)
    assert applied(clip_l_to_diffusers(original), original) == diffusers


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["as in files", "as in transformers 5"])
def test_big_g_names_both_ways(prefix: str, manifest: Manifest) -> None:
    original = below(manifest("sd_xl_refiner_1.0"), "conditioner.embedders.0.model.")
    diffusers = manifest("diffusers_text_encoder_2")
    given = {key.replace("text_model.", prefix, 1): shape for key, shape in diffusers.items()}
    assert applied(big_g_to_original(given), given) == needed(original)
    assert applied(big_g_to_diffusers(original), original) == diffusers


def test_names_nobody_knows_stay_and_so_are_reported(manifest: Manifest) -> None:
    plan = unet_to_original(["down_blocks.0.attentions.0.processor.weight", "add_k"], BASE.unet)
    assert list(plan) == ["input_blocks.1.1.processor.weight", "add_k"]
    assert list(big_g_to_original(["text_model.encoder.layers.0.self_attn.k_proj.weight"])) == [
        "transformer.resblocks.0.self_attn.k_proj.weight"
    ]


TINY_UNET = UNetConfig(
    model_channels=8, num_head_channels=4, norm_groups=2, context_dim=6, adm_in_channels=5, num_res_blocks=1
)
ODD_UNETS = {
    "attention everywhere": replace(
        TINY_UNET, channel_mult=(1, 2), transformer_depth=(1, 2), transformer_depth_middle=3
    ),
    "five levels": replace(
        TINY_UNET, channel_mult=(1, 2, 3, 4, 4), transformer_depth=(0, 1, 0, 2, 1), num_res_blocks=3
    ),
    "one level": replace(TINY_UNET, channel_mult=(1,), transformer_depth=(0,), num_res_blocks=2),
}


@pytest.mark.parametrize("config", ODD_UNETS.values(), ids=ODD_UNETS)
def test_unets_of_any_size_go_there_and_back(config: UNetConfig) -> None:
    with torch.device("meta"):
        keys = list(UNet(config).state_dict())
    there = unet_to_diffusers(keys, config)
    original = ("input_blocks", "output_blocks", "middle_block", "time_embed.", "label_emb.", "out.")
    assert not any(name.startswith(original) for name in there)
    assert {source.keys[0] for source in there.values()} == set(keys)
    assert list(unet_to_original(there, config)) == keys
