"""Small models with every structural feature, revealing weights, and the same networks built by others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import diffusers
import open_clip
import torch
import transformers
from torch import Tensor, nn

from sdxl_cli.checkpoint.layouts import (
    Plan,
    big_g_to_diffusers,
    clip_l_to_diffusers,
    unet_to_diffusers,
    vae_to_diffusers,
)
from sdxl_cli.model.config import ModelConfig, TextTowerConfig, UNetConfig, VAEConfig
from sdxl_cli.model.unet import Prepared, UNet

CLIP_L = TextTowerConfig(width=48, layers=4, heads=3, activation="quick_gelu", embed_dim=48, vocab_size=120)
BIG_G = TextTowerConfig(width=64, layers=4, heads=4, activation="gelu", embed_dim=40, vocab_size=120)
UNET = UNetConfig(
    model_channels=32,
    transformer_depth=(0, 2, 3),
    transformer_depth_middle=3,
    num_head_channels=16,
    context_dim=48 + 64,
    adm_in_channels=40 + 6 * 32,
    norm_groups=8,
)

BASE = ModelConfig(
    unet=UNET,
    vae=VAEConfig(channels=16, norm_groups=8),
    clip_l=CLIP_L,
    big_g=BIG_G,
    scalars=("original_size", "crop_top_left", "target_size"),
    scalar_dim=32,
)
"""Like the released base: three levels, attention on two, depths 2 and 3, two to eight heads."""
REFINER = replace(
    BASE,
    unet=replace(
        UNET,
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(0, 2, 2, 0),
        transformer_depth_middle=2,
        context_dim=64,
        adm_in_channels=40 + 5 * 32,
    ),
    clip_l=None,
    scalars=("original_size", "crop_top_left", "aesthetic_score"),
)
"""Like the released refiner: four levels, the deepest without attention but in the middle."""

WRITERS = re.compile(
    r"(input_blocks\.0\.0|(in|out)_layers\.[23]|emb_layers\.1|proj_in|attn_1\.proj_out|to_out\.0|ff\.net\.2"
    r"|conv_in|conv[12]|out_proj|c_proj|fc2)$"
)
"""Layers that add to what the norms read."""
PASSERS = re.compile(
    r"(skip_connection|nin_shortcut|\.op|sample\.conv|output_blocks\.\d+\.\d\.conv|\.1\.proj_out)$"
)
"""Layers that pass on what the norms read."""
TABLES = re.compile(r"(token|position(al)?)_embedding")
SELECTORS = re.compile(r"(to_q|to_k|\.q|\.k|q_proj|k_proj|in_proj_weight|ff\.net\.0\.proj|c_fc|fc1)$")
"""Layers whose outputs go through a softmax or an activation, which has to bend them."""


@torch.no_grad()
def randomize(network: nn.Module, *, stream: float = 2e-3, seed: int = 0) -> nn.Module:
    """Weights that hide nothing: every tensor random, biases and affine norms too.

    Args:
        network: one of ours, with the original's names.
        stream: standard deviation of what the norms read. With 0.002 its variance begins at 4e-6, where
            both epsilons change the result; with 1 neither would be seen.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, module in network.named_modules():
        norm = isinstance(module, nn.GroupNorm | nn.LayerNorm)
        for name, p in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            writes = WRITERS.search(path) or TABLES.search(full) or (PASSERS.search(path) and p.ndim < 2)
            gain = stream if writes else 1.0
            gain *= 1.5 if SELECTORS.search(path) or SELECTORS.search(full) else 1.0
            if norm or p.ndim < 2:
                gain *= 0.3
            elif not TABLES.search(full):
                gain *= p[0].numel() ** -0.5
            p.normal_(std=gain, generator=generator)
            if norm and name == "weight":
                p.add_(1.0)
    return network.eval().requires_grad_(False)


def stepped(unet: UNet, x: Tensor, timesteps: Tensor, prepared: Prepared) -> Tensor:
    """A step at timesteps [k·B], with what they add made beforehand."""
    return unet.step(x, unet.shifts(timesteps[None], prepared)[0], prepared)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the root mean square of what was expected."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


def taken(state: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """What a plan makes of these tensors, as views of them."""
    changes: dict[str, Callable[[Tensor, int], Tensor]] = {
        "same": lambda t, part: t,
        "squeeze": lambda t, part: t[:, :, 0, 0],
        "transpose": lambda t, part: t.T,
        "split": lambda t, part: t.chunk(3)[part],
    }
    return {name: changes[source.change](state[source.keys[0]], source.part) for name, source in plan.items()}


def hold(network: Any, state: dict[str, Tensor]) -> Any:
    """Put the tensors themselves, not copies, into a network built on the meta device."""
    network.load_state_dict(state, strict=True, assign=True)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            assert name == "position_ids", "only these are recomputed"
            setattr(module, name, torch.arange(buffer.shape[-1])[None])
    return network.eval().requires_grad_(False)


def diffusers_unet(ours: nn.Module, config: ModelConfig) -> Any:
    unet = config.unet
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    kinds = ["CrossAttn" if depth else "" for depth in unet.transformer_depth]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(
            block_out_channels=widths,
            layers_per_block=unet.num_res_blocks,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            # the last number is also the depth of the middle; a level without attention ignores its own
            transformer_layers_per_block=[
                *(depth or 1 for depth in unet.transformer_depth[:-1]),
                unet.transformer_depth_middle,
            ],
            attention_head_dim=[width // unet.num_head_channels for width in widths],
            cross_attention_dim=unet.context_dim,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=config.scalar_dim,
            in_channels=unet.in_channels,
            projection_class_embeddings_input_dim=unet.adm_in_channels,
            norm_num_groups=unet.norm_groups,
        )
    state = ours.state_dict()
    return hold(theirs, taken(state, unet_to_diffusers(state, unet)))


def diffusers_vae(ours: nn.Module, config: VAEConfig) -> Any:
    levels = len(config.channel_mult)
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            block_out_channels=[config.channels * mult for mult in config.channel_mult],
            layers_per_block=config.num_res_blocks,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            latent_channels=config.z_channels,
            norm_num_groups=config.norm_groups,
            scaling_factor=config.scale_factor,
        )
    state = ours.state_dict()
    return hold(theirs, taken(state, vae_to_diffusers(state, config)))


def transformers_config(config: TextTowerConfig) -> Any:
    return transformers.CLIPTextConfig(
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


def transformers_clip_l(ours: Any) -> Any:
    """``ours``: a ClipLEmbedder."""
    with torch.device("meta"):
        theirs = transformers.CLIPTextModel(transformers_config(ours.config))
    state = ours.transformer.state_dict()
    state = taken(state, clip_l_to_diffusers(state))
    if not any(key.startswith("text_model.") for key in theirs.state_dict()):
        state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    return hold(theirs, state)


def transformers_big_g(ours: Any) -> Any:
    """``ours``: an OpenClipEmbedder."""
    with torch.device("meta"):
        theirs = transformers.CLIPTextModelWithProjection(transformers_config(ours.config))
    state = ours.model.state_dict()
    return hold(theirs, taken(state, big_g_to_diffusers(state)))


def open_clip_model(ours: Any) -> Any:
    """OpenCLIP's own model, with a vision tower as small as can be, and the text weights of an OpenClipEmbedder."""
    config: TextTowerConfig = ours.config
    theirs = open_clip.CLIP(
        embed_dim=config.embed_dim,
        vision_cfg={"layers": 1, "width": 64, "patch_size": 8, "image_size": 8},
        text_cfg={
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "width": config.width,
            "heads": config.heads,
            "layers": config.layers,
        },
        quick_gelu=config.activation == "quick_gelu",
    )
    result = theirs.load_state_dict(ours.model.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith("visual.") for key in result.missing_keys)
    return theirs.eval().requires_grad_(False)
