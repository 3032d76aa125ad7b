"""A diffusers folder: which files it has, and which sizes its JSON files state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_cli.checkpoint.identify import Prediction, named_prediction
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import Activation, ModelConfig, Scalar, TextTowerConfig, UNetConfig, VAEConfig

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
INDEX = "model_index.json"
_NETWORK_STEMS = (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin"))
_TEXT_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))
_STEMS = {"unet": _NETWORK_STEMS, "vae": _NETWORK_STEMS}
"""Names and kinds of the files that diffusers and transformers write; pickles only where there is nothing else."""
_ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


@dataclass(frozen=True, slots=True)
class Component:
    """One network of a model: its files, all of them needed."""

    name: str
    """``unet``, ``vae``, ``text_encoder``, ``text_encoder_2``; or ``model`` for a single file."""
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Folder:
    """What a diffusers folder holds."""

    components: tuple[Component, ...]
    config: ModelConfig
    prediction: Prediction
    zero_terminal_snr: bool


def is_pipeline(path: Path) -> bool:
    """Whether a folder is a diffusers pipeline."""
    return (path / INDEX).is_file()


def is_vae(path: Path) -> bool:
    """Whether a folder is a diffusers autoencoder alone."""
    return (path / "config.json").is_file() and _json(path / "config.json").get(
        "_class_name"
    ) == "AutoencoderKL"


def read_pipeline(path: Path, variant: str | None) -> Folder:
    """Find the files and sizes of an SDXL pipeline.

    Args:
        path: the folder that has ``model_index.json``.
        variant: the precision to prefer where several are there (``"fp16"``); None prefers the plain files.

    Raises:
        FileError: it is another pipeline, a file is missing, or a network is not as SDXL's.
    """
    index = _json(path / INDEX)
    kind = str(index.get("_class_name", ""))
    if "StableDiffusionXL" not in kind:
        raise FileError(
            f"{path} is a diffusers folder of {kind or 'an unnamed pipeline'}, not of Stable Diffusion XL"
        )
    present = [name for name in COMPONENTS if (path / name).is_dir()]
    for name in ("unet", "vae", "text_encoder_2"):
        if name not in present:
            raise FileError(f"{path} has no {name}/ folder; download it again")
    settings = {name: _json(path / name / "config.json") for name in present}
    aesthetic = bool(index.get("requires_aesthetics_score", "text_encoder" not in present))
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    try:
        config = _config(settings, aesthetic)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} has a configuration unlike SDXL's: {error}") from error
    return Folder(
        components=tuple(Component(name, weights(path / name, name, variant)) for name in present),
        config=config,
        prediction=named_prediction(str(scheduler.get("prediction_type", ""))),
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")),
    )


def read_vae(path: Path, variant: str | None) -> tuple[Component, VAEConfig]:
    """Find the files and sizes of an autoencoder's own folder.

    Raises:
        FileError: a file is missing or the sizes are not those of a KL autoencoder.
    """
    try:
        config = vae_config(_json(path / "config.json"))
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} has a configuration unlike SDXL's: {error}") from error
    return Component("vae", weights(path, "vae", variant)), config


def weights(folder: Path, component: str, variant: str | None) -> tuple[Path, ...]:
    """The files of one network: one, or the shards its index names.

    Raises:
        FileError: there is none, or a shard is missing.
    """
    suffixes = tuple(dict.fromkeys([f".{variant}" if variant else "", "", ".fp16", ".bf16"]))
    for stem, kind in _STEMS.get(component, _TEXT_STEMS):
        for suffix in suffixes:
            single = folder / f"{stem}{suffix}.{kind}"
            if single.is_file():
                return (single,)
            index = folder / f"{stem}.{kind}.index{suffix}.json"
            if index.is_file():
                return _shards(index)
    expected = ".".join(_STEMS.get(component, _TEXT_STEMS)[0])
    raise FileError(f"{folder} has no {expected}; the download is incomplete: download it again")


def _shards(index: Path) -> tuple[Path, ...]:
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise FileError(f"{index} names no files; download it again")
    paths = tuple(index.parent / name for name in sorted(set(map(str, names.values()))))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        first = ", ".join(missing[:3])
        raise FileError(
            f"{index.parent} lacks {len(missing)} of {len(paths)} shards ({first}); download it again"
        )
    return paths


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is damaged or cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} is damaged: it is no JSON object")
    return value


def _config(settings: Mapping[str, Mapping[str, Any]], aesthetic: bool) -> ModelConfig:
    vae = vae_config(settings["vae"])
    unet = settings["unet"]
    last: Scalar = "aesthetic_score" if aesthetic else "target_size"
    return ModelConfig(
        unet=unet_config(unet),
        vae=vae,
        clip_l=_tower(settings["text_encoder"]) if "text_encoder" in settings else None,
        big_g=_tower(settings["text_encoder_2"]),
        scalars=("original_size", "crop_top_left", last),
        scalar_dim=int(unet.get("addition_time_embed_dim") or 256),
        native_size=_side(unet.get("sample_size") or 128) * vae.downsampling,
    )


def unet_config(values: Mapping[str, Any]) -> UNetConfig:
    """diffusers ``UNet2DConditionModel`` -> ours.

    ``attention_head_dim`` there is the number of heads of each level (facts.md section 7, item 8).

    Raises:
        KeyError, ValueError: it lacks a size, or has a structure that SDXL's U-Net cannot take.
    """
    widths = [int(width) for width in values["block_out_channels"]]
    levels = len(widths)
    with_attention = ["CrossAttn" in kind for kind in values["down_block_types"]]
    depths = _per_level(values.get("transformer_layers_per_block", 1), levels)
    heads = _per_level(values.get("num_attention_heads") or values["attention_head_dim"], levels)
    blocks = _per_level(values.get("layers_per_block", 2), levels)
    head_width = {
        width // head
        for width, head, attends in zip(widths, heads, [*with_attention[:-1], True], strict=True)
        if attends
    }
    if len(set(blocks)) > 1 or len(head_width) != 1 or any(width % widths[0] for width in widths):
        raise ValueError("levels of uneven structure")
    if values.get("addition_embed_type") != "text_time" or not values.get("use_linear_projection"):
        raise ValueError("its U-Net takes no size conditioning or has convolutional projections")
    return UNetConfig(
        in_channels=int(values.get("in_channels", 4)),
        out_channels=int(values.get("out_channels", 4)),
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=blocks[0],
        transformer_depth=tuple(depth if on else 0 for depth, on in zip(depths, with_attention, strict=True)),
        transformer_depth_middle=depths[-1],
        num_head_channels=head_width.pop(),
        context_dim=int(values["cross_attention_dim"]),
        adm_in_channels=int(values["projection_class_embeddings_input_dim"]),
        norm_groups=int(values.get("norm_num_groups") or 32),
    )


def vae_config(values: Mapping[str, Any]) -> VAEConfig:
    """diffusers ``AutoencoderKL`` -> ours.

    Raises:
        KeyError, ValueError: it lacks a size, or shifts or normalises latents, which SDXL does not.
    """
    widths = [int(width) for width in values["block_out_channels"]]
    if values.get("latents_mean") or values.get("shift_factor"):
        raise ValueError("its VAE shifts latents")
    if any(width % widths[0] for width in widths):
        raise ValueError("VAE levels of uneven width")
    return VAEConfig(
        in_channels=int(values.get("in_channels", 3)),
        z_channels=int(values.get("latent_channels", 4)),
        channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=int(values.get("layers_per_block", 1)),
        norm_groups=int(values.get("norm_num_groups") or 32),
        scale_factor=float(values.get("scaling_factor", 0.18215)),
    )


def _tower(values: Mapping[str, Any]) -> TextTowerConfig:
    width = int(values["hidden_size"])
    return TextTowerConfig(
        width=width,
        layers=int(values["num_hidden_layers"]),
        heads=int(values["num_attention_heads"]),
        activation=_ACTIVATIONS[values.get("hidden_act", "quick_gelu")],
        embed_dim=int(values.get("projection_dim") or width),
        vocab_size=int(values.get("vocab_size", 49408)),
        context_length=int(values.get("max_position_embeddings", 77)),
    )


def _per_level(value: int | Sequence[int], levels: int) -> list[int]:
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels or not all(isinstance(item, int) for item in values):
        raise ValueError(f"{value} for {levels} levels")
    return values


def _side(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else max(value)
