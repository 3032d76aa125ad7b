"""What the JSON files of a diffusers folder say: the sizes of every network, the scheduler, the tokenizers.

The values that are not sizes are those of the released folders (stabilityai/stable-diffusion-xl-base-1.0 and
-refiner-1.0), so that diffusers and transformers build the same networks from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_cli.checkpoint.identify import Prediction
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import ModelConfig, TextTowerConfig, VAEConfig

Json = dict[str, Any]

_DIFFUSERS = {"_diffusers_version": "0.19.0"}
"""The first version with the refiner and the size conditioning as released; later ones read it."""
START, END = "<|startoftext|>", "<|endoftext|>"
PADDING = {"tokenizer": END, "tokenizer_2": "!"}
"""What fills a row of tokens: CLIP-L's end token, OpenCLIP's id 0 (facts.md section 3)."""
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_PIPELINES = {
    "base": "StableDiffusionXLPipeline",
    "inpaint": "StableDiffusionXLInpaintPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}


def unet_json(config: ModelConfig) -> Json:
    """``unet/config.json``, the inverse of :func:`sdxl_cli.checkpoint.diffusers_folder.unet_config`.

    Raises:
        FileError: the depth of the middle differs from that of the last level, which diffusers has no words for.
    """
    unet = config.unet
    depths = unet.transformer_depth
    if depths[-1] not in (0, unet.transformer_depth_middle):
        raise FileError(
            f"a U-Net with {depths[-1]} transformer blocks at its last level and {unet.transformer_depth_middle} "
            "in the middle cannot be a diffusers folder; convert it to a single file"
        )
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    return {
        "_class_name": "UNet2DConditionModel",
        **_DIFFUSERS,
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": config.scalar_dim,
        # the number of heads, whatever the name says (facts.md section 7, item 8)
        "attention_head_dim": [max(width // unet.num_head_channels, 1) for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.num_res_blocks,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": unet.norm_groups,
        "num_attention_heads": None,
        "out_channels": unet.out_channels,
        "projection_class_embeddings_input_dim": unet.adm_in_channels,
        "resnet_time_scale_shift": "default",
        "sample_size": config.native_size // config.vae.downsampling,
        "transformer_layers_per_block": [
            *(depth or 1 for depth in depths[:-1]),
            unet.transformer_depth_middle,
        ],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "use_linear_projection": True,
    }


def vae_json(config: VAEConfig, native_size: int) -> Json:
    """``vae/config.json``, the inverse of :func:`sdxl_cli.checkpoint.diffusers_folder.vae_config`."""
    levels = len(config.channel_mult)
    return {
        "_class_name": "AutoencoderKL",
        **_DIFFUSERS,
        "act_fn": "silu",
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        # the released autoencoder overflows in fp16
        "force_upcast": True,
        "in_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.in_channels,
        "sample_size": native_size,
        "scaling_factor": config.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def tower_json(config: TextTowerConfig, architecture: str) -> Json:
    """``text_encoder/config.json``; ``architecture`` is the class of transformers.

    The ids are the placeholders of the released files: with an end id of 2, transformers takes the pooled feature
    at the largest id of a row, as OpenCLIP does.
    """
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * config.width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": 1,
        "projection_dim": config.embed_dim,
        "vocab_size": config.vocab_size,
    }


def scheduler_json(prediction: Prediction, zero_terminal_snr: bool) -> Json:
    """``scheduler/scheduler_config.json``: Euler on the released grid; the last 1000th for zero terminal SNR."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        **_DIFFUSERS,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": _PREDICTIONS[prediction],
        "rescale_betas_zero_snr": zero_terminal_snr,
        "steps_offset": 1,
        # a model of pure noise at step 999 must be started there, which "leading" never does
        "timestep_spacing": "trailing" if zero_terminal_snr else "leading",
        "use_karras_sigmas": False,
    }


def index_json(kind: str, has_tokenizers: bool) -> Json:
    """``model_index.json``: which classes read which folder; ``kind`` is base, inpaint or refiner."""
    is_refiner = kind == "refiner"
    clip = None if is_refiner else "transformers"
    tokens = "transformers" if has_tokenizers else None
    return {
        "_class_name": _PIPELINES[kind],
        **_DIFFUSERS,
        "force_zeros_for_empty_prompt": not is_refiner,
        **({"requires_aesthetics_score": True} if is_refiner else {}),
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": [clip, "CLIPTextModel" if clip else None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [clip and tokens, "CLIPTokenizer" if clip and tokens else None],
        "tokenizer_2": [tokens, "CLIPTokenizer" if tokens else None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def tokenizer_files(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], pad: str, length: int
) -> dict[str, str]:
    """The files of a ``tokenizer`` folder: name -> text.

    Args:
        vocabulary: CLIP's 49408 pieces.
        merges: in the order they were learned.
        pad: the token that fills a row.
        length: ids in a row.
    """
    special = {"bos_token": START, "eos_token": END, "unk_token": END}
    settings: Json = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        "merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n",
        "special_tokens_map.json": to_text(special | {"pad_token": pad}),
        "tokenizer_config.json": to_text(settings | special),
        "vocab.json": json.dumps(dict(vocabulary), ensure_ascii=False),
    }


def to_text(value: Json) -> str:
    """JSON as the published files have it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
