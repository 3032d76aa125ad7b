"""Folders that diffusers and transformers write are read by us, and compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdxl_cli.checkpoint.layouts import (
    big_g_to_diffusers,
    clip_l_to_diffusers,
    unet_to_diffusers,
    vae_to_diffusers,
)
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model, load_vae
from sdxl_cli.checkpoint.tensor_file import Renamed, TensorFile
from sdxl_cli.checkpoint.write import save_tensors
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import ModelConfig, TextTowerConfig, UNetConfig, VAEConfig
from sdxl_cli.model.sdxl import SDXL

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def their_unet(config: UNetConfig, scalar_dim: int, side: int) -> Any:
    widths = [config.model_channels * mult for mult in config.channel_mult]
    kinds = ["CrossAttn" if depth else "" for depth in config.transformer_depth]
    return diffusers.UNet2DConditionModel(
        sample_size=side,
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        transformer_layers_per_block=[
            *(depth or 1 for depth in config.transformer_depth[:-1]),
            config.transformer_depth_middle,
        ],
        attention_head_dim=[width // config.num_head_channels for width in widths],
        cross_attention_dim=config.context_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=scalar_dim,
        projection_class_embeddings_input_dim=config.adm_in_channels,
        norm_num_groups=config.norm_groups,
    )


def their_vae(config: VAEConfig) -> Any:
    levels = len(config.channel_mult)
    return diffusers.AutoencoderKL(
        block_out_channels=[config.channels * mult for mult in config.channel_mult],
        layers_per_block=config.num_res_blocks,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=config.z_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scale_factor,
    )


def their_tower(config: TextTowerConfig, cls: Any) -> Any:
    return cls(
        transformers.CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act=config.activation,
            projection_dim=config.embed_dim,
            max_position_embeddings=config.context_length,
            bos_token_id=config.vocab_size - 2,
            eos_token_id=config.vocab_size - 1,
        )
    )


def their_model(config: ModelConfig) -> dict[str, Any]:
    torch.manual_seed(0)
    networks = {
        "unet": their_unet(config.unet, config.scalar_dim, config.native_size // config.vae.downsampling),
        "vae": their_vae(config.vae),
        "text_encoder_2": their_tower(config.big_g, transformers.CLIPTextModelWithProjection),
    }
    if config.clip_l:
        networks["text_encoder"] = their_tower(config.clip_l, transformers.CLIPTextModel)
    for network in networks.values():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        network.eval()
    return networks


def save(networks: dict[str, Any], folder: Path, **options: Any) -> None:
    for name, network in networks.items():
        network.save_pretrained(folder / name, **options)
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def compare(ours: SDXL, theirs: dict[str, Any], config: ModelConfig) -> None:
    """Outputs, not weights: swapped queries and keys would have the same shapes."""
    torch.manual_seed(1)
    side = config.native_size // config.vae.downsampling
    x, t = torch.randn(2, 4, side, side), torch.tensor([3, 800])
    context = torch.randn(2, 7, config.unet.context_dim)
    ids = torch.randint(0, config.big_g.vocab_size - 1, (2, 77))
    ids[:, 40:] = config.big_g.vocab_size - 1
    pooled = torch.randn(2, config.big_g.embed_dim)
    numbers = torch.randn(2, (config.unet.adm_in_channels - config.big_g.embed_dim) // config.scalar_dim)
    # what their U-Net makes of the numbers is the vector that ours is given
    unet = theirs["unet"]
    scalars = unet.add_time_proj(numbers.flatten()).reshape(2, -1)
    added = {"text_embeds": pooled, "time_ids": numbers}
    expected = unet(x, t, context, added_cond_kwargs=added).sample
    assert relative(ours.unet(x, t, context, torch.cat([pooled, scalars], 1)), expected) < 1e-5

    image = torch.randn(2, 3, config.native_size, config.native_size)
    assert relative(ours.vae.encode(image).mean, theirs["vae"].encode(image).latent_dist.mean) < 1e-5
    assert relative(ours.vae.decode(x), theirs["vae"].decode(x).sample) < 1e-5

    *_, big_g = ours.conditioner.embedders
    penultimate, projected = big_g(ids)
    out = theirs["text_encoder_2"](ids, output_hidden_states=True)
    assert relative(penultimate, out.hidden_states[-2]) < 1e-5
    assert relative(projected, out.text_embeds) < 1e-5
    if config.clip_l:
        out = theirs["text_encoder"](ids, output_hidden_states=True)
        assert relative(ours.conditioner.embedders[0](ids), out.hidden_states[-2]) < 1e-5


def load(folder: Path, role: Any = "base", **options: Any) -> SDXL:
    files = locate(str(folder), role, **options)
    return load_model(files, dtype=torch.float32, vae_dtype=torch.float32)


@torch.no_grad()
def test_a_base_folder_computes_as_in_diffusers(small_config: ModelConfig, tmp_path: Path) -> None:
    theirs = their_model(small_config)
    save(theirs, tmp_path)
    files = locate(str(tmp_path))
    assert files.config == small_config
    assert (files.layout, files.identity.kind, files.prediction) == ("diffusers", "base", "eps")
    compare(load(tmp_path), theirs, small_config)


@torch.no_grad()
def test_a_refiner_folder_computes_as_in_diffusers(small_refiner_config: ModelConfig, tmp_path: Path) -> None:
    theirs = their_model(small_refiner_config)
    save(theirs, tmp_path)
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": true}'
    )
    assert locate(str(tmp_path), "refiner").config == small_refiner_config
    compare(load(tmp_path, "refiner"), theirs, small_refiner_config)


@torch.no_grad()
def test_shards_and_variants_are_read(small_config: ModelConfig, tmp_path: Path) -> None:
    theirs = their_model(small_config)
    save(theirs, tmp_path, max_shard_size="400KB", variant="fp16")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    compare(load(tmp_path), theirs, small_config)
    files = locate(str(tmp_path), variant="fp16")
    assert all(".fp16" in path.name for path in files.paths)


def test_the_asked_for_variant_is_preferred(small_config: ModelConfig, tmp_path: Path) -> None:
    theirs = their_model(small_config)
    save(theirs, tmp_path)
    plain = locate(str(tmp_path)).paths
    for network in theirs.values():
        network.half()
    save(theirs, tmp_path, variant="fp16")
    assert locate(str(tmp_path)).paths == plain
    assert all(".fp16." in path.name for path in locate(str(tmp_path), variant="fp16").paths)


@torch.no_grad()
def test_an_autoencoder_alone_in_every_form(small_config: ModelConfig, tmp_path: Path) -> None:
    vae = their_model(small_config)["vae"]
    vae.save_pretrained(tmp_path / "vae")
    z = torch.randn(1, 4, 8, 8)
    expected = vae.decode(z).sample
    files = locate(str(tmp_path / "vae"), "vae")
    assert files.config.vae == small_config.vae
    assert relative(load_vae(files, dtype=torch.float32).decode(z), expected) < 1e-5


def test_prediction_is_read_from_the_scheduler(small_config: ModelConfig, tmp_path: Path) -> None:
    save(their_model(small_config), tmp_path)
    (tmp_path / "scheduler").mkdir()
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    files = locate(str(tmp_path))
    assert files.prediction == "v"
    assert files.identity.zero_terminal_snr


@torch.no_grad()
def test_what_our_plans_write_diffusers_loads(
    small_config: ModelConfig, tmp_path: Path, random_model: Callable[[ModelConfig], SDXL]
) -> None:
    ours, theirs = random_model(small_config), their_model(small_config)
    parts = {
        "unet": (ours.unet, lambda keys: unet_to_diffusers(keys, small_config.unet)),
        "vae": (ours.vae, lambda keys: vae_to_diffusers(keys, small_config.vae)),
        "text_encoder": (ours.conditioner.embedders[0].transformer, clip_l_to_diffusers),
        "text_encoder_2": (ours.conditioner.embedders[1].model, big_g_to_diffusers),
    }
    for name, (network, plan) in parts.items():
        save_tensors(tmp_path / "part.safetensors", network.state_dict())
        original = TensorFile(tmp_path / "part.safetensors")
        renamed = Renamed(original, plan(original.shapes))
        state = {key: renamed.read(key) for key in renamed.shapes}
        if "text_model.embeddings.token_embedding.weight" not in theirs[name].state_dict() and "text" in name:
            state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        theirs[name].load_state_dict(state)
    compare(ours, theirs, small_config)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "incomplete"),
        (lambda folder: (folder / "vae").rename(folder / "gone"), "has no vae/ folder"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{}"), "unlike SDXL's"),
        (
            lambda folder: (folder / "model_index.json").write_text(
                '{"_class_name": "StableDiffusionPipeline"}'
            ),
            "of StableDiffusionPipeline, not of Stable Diffusion XL",
        ),
    ],
)
def test_broken_folders_are_named(
    break_it: Callable[[Path], object], says: str, small_config: ModelConfig, tmp_path: Path
) -> None:
    save(their_model(small_config), tmp_path)
    break_it(tmp_path)
    with pytest.raises(FileError, match=says):
        locate(str(tmp_path))


def test_a_missing_shard_is_named(small_config: ModelConfig, tmp_path: Path) -> None:
    save(their_model(small_config), tmp_path, max_shard_size="400KB")
    next((tmp_path / "unet").glob("*-00002-*")).unlink()
    with pytest.raises(FileError, match=r"lacks 1 of \d+ shards"):
        locate(str(tmp_path))


@torch.no_grad()
def test_a_folder_of_pickles_is_read(small_config: ModelConfig, tmp_path: Path) -> None:
    """As everybody wrote them before 2023: also in shards, for which diffusers has no writer any more."""
    theirs = their_model(small_config)
    for name, network in theirs.items():
        network.save_pretrained(tmp_path / name)
        file = next((tmp_path / name).glob("*.safetensors"))
        state = load_file(file)
        stem = "diffusion_pytorch_model" if name in ("unet", "vae") else "pytorch_model"
        names = sorted(state)
        for number, part in enumerate((names[::2], names[1::2]) if name == "unet" else (names,)):
            shard = f"{stem}-{number}.bin" if name == "unet" else f"{stem}.bin"
            torch.save({key: state[key] for key in part}, tmp_path / name / shard)
        if name == "unet":
            where = {key: f"{stem}-{index % 2}.bin" for index, key in enumerate(names)}
            (tmp_path / name / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": where}))
        file.unlink()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    compare(load(tmp_path), theirs, small_config)


def test_one_part_of_a_folder_is_not_a_model(small_config: ModelConfig, tmp_path: Path) -> None:
    save(their_model(small_config), tmp_path)
    with pytest.raises(FileError, match="one part of a diffusers folder; give the whole one"):
        locate(str(tmp_path / "unet"))
    with pytest.raises(FileError, match="U-Net alone"):
        locate(str(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"))
