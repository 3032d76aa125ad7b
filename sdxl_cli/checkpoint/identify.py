"""What a file is, from the names and shapes of its tensors; its name is never trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sdxl_cli.checkpoint.lora_family import lora_family
from sdxl_cli.checkpoint.lora_keys import group_layers
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import BASE, PREFIXES, REFINER, ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
Prediction = Literal["eps", "v", "x0"]
"""The noise, the velocity, or the clean latent itself."""
Layout = Literal["original", "diffusers"]
Kind = Literal["base", "refiner", "inpaint", "vae", "unet", "text encoder", "adapter", "other"]

UNET, VAE, TEXT = PREFIXES["unet"], PREFIXES["vae"], PREFIXES["text"]
CLIP_L = f"{TEXT}embedders.0.transformer."
CONFIG_KEY = "sdxl.config"
"""Metadata: the sizes of a model that is not one of the released two, as JSON."""
TOKEN_IDS = "sdxl.token_ids"
"""Tensor: the token ids whose rows a vocabulary-pruned file keeps, I64 [n]; the tables have n + 1 rows."""

V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
"""Tensors without content by which ComfyUI and others know v-prediction and zero terminal SNR."""
_PREDICTIONS: dict[str, Prediction] = {
    "v": "v",
    "v_prediction": "v",
    "vpred": "v",
    "x0": "x0",
    "sample": "x0",
}
_EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_LORA_MARKS = (
    ".lora_down.",
    ".lora_up.",
    ".lora_A.",
    ".lora_B.",
    ".lora.",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w2",
    ".diff_b",
    ".w_norm",
    ".oft_blocks",
    ".on_input",
    ".a1.weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a file is."""

    kind: Kind
    label: str
    """In words, for messages: ``SDXL refiner``, ``LoRA (SDXL, rank 32)``."""
    layout: Layout = "original"
    config: ModelConfig | None = None
    """The sizes, for kinds that are SDXL or a part of it. A VAE or U-Net alone has the released sizes elsewhere."""
    prediction: Prediction = "eps"
    zero_terminal_snr: bool = False
    title: str = ""
    """What its metadata calls it."""
    tensors: int = 0
    parameters: int = 0
    """Elements of all tensors."""
    ignored: tuple[str, ...] = ()
    """Names that belong to no part of SDXL and are not read."""


def big_g_prefix(config: ModelConfig) -> str:
    """Where the OpenCLIP tower is: second embedder of the base, first of the refiner."""
    return f"{TEXT}embedders.{1 if config.clip_l else 0}.model."


def identify(shapes: Shapes, metadata: Mapping[str, str]) -> Identity:
    """Say what a file is.

    Args:
        shapes: every tensor's shape, by name.
        metadata: the file's ``__metadata__``.

    Raises:
        FileError: the metadata has a ``sdxl.config`` that is not one.
    """
    found = next(identity for rule in _RULES if (identity := rule(shapes, metadata)) is not None)
    return replace(
        found,
        prediction=_prediction(shapes, metadata),
        zero_terminal_snr=ZERO_SNR_KEY in shapes,
        title=metadata.get("modelspec.title", ""),
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        ignored=_ignored(found, shapes),
    )


@dataclass(frozen=True, slots=True)
class Differences:
    """How a file's tensors differ from a model's."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mis_shaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Name, shape in the file, shape in the model."""

    def __str__(self) -> str:
        """One line: of each kind the number and the first names. Empty when there is no difference."""
        shapes = [f"{name} {list(here)} instead of {list(wanted)}" for name, here, wanted in self.mis_shaped]
        kinds = (("missing", self.missing), ("mis-shaped", shapes), ("unexpected", self.unexpected))
        return "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds if names)


def compare(shapes: Shapes, expected: Shapes) -> Differences:
    """Compare a file's tensors with a model's. What the model does not need is never missing or unexpected.

    1x1 convolutions stored as linear layers count as the same shape.
    """
    missing = tuple(name for name in expected if name not in shapes and not is_optional(name))
    unexpected = tuple(name for name in shapes if name not in expected and not is_optional(name))
    mis_shaped = tuple(
        (name, shapes[name], shape)
        for name, shape in expected.items()
        if name in shapes and _without_ones(shapes[name]) != _without_ones(shape)
    )
    return Differences(missing, unexpected, mis_shaped)


def is_optional(name: str) -> bool:
    """Whether a model works without this tensor and a file may carry it all the same (facts.md section 2)."""
    return name.endswith((".position_ids", ".logit_scale", ".attn_mask"))


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _prediction(shapes: Shapes, metadata: Mapping[str, str]) -> Prediction:
    return "v" if V_KEY in shapes else named_prediction(metadata.get("modelspec.prediction_type", ""))


def named_prediction(name: str) -> Prediction:
    """A name that metadata or a diffusers scheduler has for what a model predicts; the noise where it says nothing."""
    return _PREDICTIONS.get(name.strip().lower().replace("-", "_"), "eps")


def _ignored(identity: Identity, shapes: Shapes) -> tuple[str, ...]:
    if identity.kind not in ("base", "refiner", "inpaint"):
        return ()
    marks = (TOKEN_IDS, V_KEY, ZERO_SNR_KEY)
    return tuple(name for name in shapes if not name.startswith((UNET, VAE, TEXT)) and name not in marks)


def stored_config(metadata: Mapping[str, str]) -> ModelConfig | None:
    """The configuration a file carries, completed with the released sizes where it speaks of a part only.

    Raises:
        FileError: it is not a configuration.
    """
    text = metadata.get(CONFIG_KEY)
    if text is None:
        return None
    try:
        values = json.loads(text)
        if set(values) == {"vae"}:
            values = BASE.to_dict() | values
        return ModelConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"its metadata {CONFIG_KEY} is damaged ({error})") from error


def _full_model(shapes: Shapes, metadata: Mapping[str, str]) -> Identity | None:
    """The original single file: U-Net and conditioner under their prefixes."""
    if not _any(shapes, UNET) or not _any(shapes, TEXT):
        return None
    config = stored_config(metadata) or (BASE if _any(shapes, f"{TEXT}embedders.1.model.") else REFINER)
    in_channels = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, config.unet.in_channels))[1]
    if any(key in shapes for key in _EDM_KEYS):
        return Identity(kind="other", label="an SDXL model of the EDM formulation (as Playground v2.5)")
    if in_channels == config.unet.in_channels == 4:
        kind: Kind = "refiner" if config.is_refiner else "base"
        return Identity(kind=kind, label=f"an SDXL {kind} model", config=config)
    config = replace(config, unet=replace(config.unet, in_channels=in_channels))
    if in_channels == 9:
        return Identity(kind="inpaint", label="an SDXL inpainting model (9 input channels)", config=config)
    return Identity(kind="other", label=f"an SDXL model with {in_channels} input channels", config=config)


def _adapter(shapes: Shapes, metadata: Mapping[str, str]) -> Identity | None:
    if any(mark in name for name in shapes for mark in _LORA_MARKS):
        layers, _ = group_layers(shapes)
        family = lora_family(layers, shapes, metadata).label or "unknown architecture"
        ranks = [shapes[layer.keys["down"]][0] for layer in layers if "down" in layer.keys]
        rank = f", rank {max(set(ranks), key=ranks.count)}" if ranks else ""
        return Identity(kind="adapter", label=f"a LoRA ({family}{rank})")
    if any(
        name.startswith(("control_model.", "controlnet_")) or "input_hint_block" in name for name in shapes
    ):
        return Identity(kind="adapter", label="a ControlNet")
    if any(name.startswith(("ip_adapter.", "image_proj.")) for name in shapes):
        return Identity(kind="adapter", label="an IP-Adapter")
    if {"clip_l", "clip_g"} & shapes.keys() or "emb_params" in shapes:
        return Identity(kind="adapter", label="a textual inversion embedding")
    return None


def _other_checkpoint(shapes: Shapes, metadata: Mapping[str, str]) -> Identity | None:
    """Whole checkpoints of other families."""
    marks = (
        ("cond_stage_model.transformer.", "a Stable Diffusion 1 model"),
        ("cond_stage_model.model.", "a Stable Diffusion 2 model"),
        (f"{UNET}joint_blocks.", "a Stable Diffusion 3 model"),
        ("joint_blocks.", "a Stable Diffusion 3 model"),
        (f"{UNET}double_blocks.", "a Flux model"),
        ("double_blocks.", "a Flux model"),
        (f"{UNET}input_blocks.1.1.time_stack.", "a Stable Video Diffusion model"),
        ("clip_txt_pooled_mapper.", "a Stable Cascade model"),
        ("y_embedder.y_proj.", "a PixArt model"),
        ("mlp_t5.", "a Hunyuan-DiT model"),
        ("double_layers.0.attn.w1q.", "an AuraFlow model"),
        ("txt_in.individual_token_refiner.", "a HunyuanVideo model"),
        ("cap_embedder.", "a Lumina model"),
        ("patchify_proj.", "an LTX-Video model"),
        ("head.modulation", "a Wan model"),
        (
            "transformer_blocks.0.attn.add_q_proj.",
            "a multimodal diffusion transformer (SD 3, Flux or Qwen-Image)",
        ),
        ("model_ema.", "a training checkpoint with averaged weights only"),
    )
    label = next((label for prefix, label in marks if _any(shapes, prefix)), None)
    return Identity(kind="other", label=label) if label else None


def _unet(shapes: Shapes, metadata: Mapping[str, str]) -> Identity | None:
    """A U-Net without its autoencoder and text encoders, in either layout, with or without prefix."""
    names: tuple[tuple[Layout, str, str], ...] = (
        ("original", f"{UNET}input_blocks.0.0.weight", f"{UNET}label_emb.0.0.weight"),
        ("original", "input_blocks.0.0.weight", "label_emb.0.0.weight"),
        ("diffusers", "down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight"),
    )
    for layout, mark, vector in names:
        if mark in shapes:
            width = shapes.get(vector, (0, 0))[1]
            known = {BASE.unet.adm_in_channels: "SDXL base", REFINER.unet.adm_in_channels: "SDXL refiner"}
            family = known.get(width, "another architecture")
            return Identity(kind="unet", label=f"a U-Net alone ({family})", layout=layout)
    return None


def _vae(shapes: Shapes, metadata: Mapping[str, str]) -> Identity | None:
    """An autoencoder alone. SD 1, SD 2 and SDXL autoencoders have the same names and shapes."""
    prefix = VAE if _any(shapes, VAE) else ""
    latent = shapes.get(f"{prefix}decoder.conv_in.weight")
    if latent is None or f"{prefix}encoder.conv_in.weight" not in shapes:
        return None
    config = stored_config(metadata) or BASE
    if latent[1] != config.vae.z_channels:
        return Identity(kind="other", label=f"a VAE with {latent[1]} latent channels, where SDXL has 4")
    layout: Layout = "diffusers" if _any(shapes, f"{prefix}encoder.down_blocks.") else "original"
    return Identity(kind="vae", label="a VAE", layout=layout, config=config)


def _text_encoder(shapes: Shapes, metadata: Mapping[str, str]) -> Identity | None:
    for mark in ("text_model.", "transformer.resblocks.", "encoder.layers.", TEXT):
        if _any(shapes, mark):
            return Identity(kind="text encoder", label="a text encoder alone")
    return None


def _unknown(shapes: Shapes, metadata: Mapping[str, str]) -> Identity | None:
    names = _first(sorted(shapes)) or "none"
    return Identity(kind="other", label=f"no model this program knows ({len(shapes)} tensors: {names})")


_RULES: tuple[Callable[[Shapes, Mapping[str, str]], Identity | None], ...] = (
    _adapter,
    _full_model,
    _other_checkpoint,
    _unet,
    _vae,
    _text_encoder,
    _unknown,
)
"""Tried in this order; the last one always answers."""


def _any(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)
