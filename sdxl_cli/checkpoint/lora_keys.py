"""The names that trainers give the tensors of a LoRA: which network, which layer, and what part of the change it is.

A name is a layer's path, written by kohya with underscores and by everybody else with dots, between a prefix for the
network and an ending for the role. Dots become underscores here, so that both writings are one. The families:
kohya's sd-scripts and LyCORIS (``lora_unet_…``, ``lora_te1_…``), diffusers and PEFT (``unet.…``, ``text_encoder.…``,
``base_model.model.…``), diffusers before it used PEFT (``….processor.to_q_lora.down.weight``), ComfyUI
(``diffusion_model.…``), LyCORIS used on a network by itself (``lycoris_…``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Scope = Literal["unet", "clip_l", "big_g", "elsewhere"]
"""The network; ``elsewhere`` is one that SDXL does not have, such as the one text encoder of SD 1."""


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """All tensors of a file that change one layer."""

    scope: Scope
    module: str
    """Path of the layer in its network, with underscores: ``input_blocks_4_1_proj_in``."""
    name: str
    """The layer as the file writes it, for messages."""
    keys: dict[str, str]
    """Role -> name of the tensor."""


def group_layers(keys: Iterable[str]) -> tuple[list[LoraLayer], list[str]]:
    """Sort tensors by layer.

    Returns:
        The layers in the order of the file, and the names that are no part of a LoRA.
    """
    layers: dict[tuple[Scope, str], LoraLayer] = {}
    others = []
    for key in keys:
        found = _split(key)
        if found is None:
            others.append(key)
            continue
        path, role = found
        scope, module = _locate(path)
        layer = layers.setdefault((scope, module), LoraLayer(scope, module, path, {}))
        if role in layer.keys:
            others.append(key)
        layer.keys.setdefault(role, key)
    return list(layers.values()), others


_PREFIXES: tuple[tuple[str, Scope], ...] = (
    ("lora_unet_", "unet"),
    ("model_diffusion_model_", "unet"),
    ("diffusion_model_", "unet"),
    ("unet_", "unet"),
    ("lora_te1_", "clip_l"),
    ("lora_te2_", "big_g"),
    ("lora_te3_", "elsewhere"),
    ("lora_te_", "elsewhere"),
    ("text_encoder_3_", "elsewhere"),
    ("text_encoder_2_", "big_g"),
    ("text_encoder_", "clip_l"),
    ("text_encoders_clip_l_transformer_", "clip_l"),
    ("text_encoders_clip_g_transformer_", "big_g"),
    ("clip_l_transformer_", "clip_l"),
    ("clip_g_transformer_", "big_g"),
    ("te1_", "clip_l"),
    ("te2_", "big_g"),
    ("transformer_", "elsewhere"),
    ("lora_transformer_", "elsewhere"),
)
"""A path without any of these is one of the U-Net's."""

_ENDINGS: dict[str, str] = {
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    "_lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_A.weight": "down",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    "_lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_mid.weight": "mid",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    **{f".{role}": role for role in ("alpha", "scalar", "diff", "diff_b", "w_norm", "b_norm")},
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{part}.weight": part for part in ("a1", "a2", "b1", "b2", "bm")},
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".on_input": "on_input",
    # IA3's own; it comes last because the others also end like this
    ".weight": "weight",
}
"""How a tensor's name ends -> its role."""

_ADAPTER_NAME = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(?=\.|$)")
"""PEFT's name of the adapter, in the middle of the tensor's."""


def _split(key: str) -> tuple[str, str] | None:
    """The layer's path and the role."""
    key = _ADAPTER_NAME.sub(r".\1", key)
    for ending, role in _ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return None


def _locate(path: str) -> tuple[Scope, str]:
    """The network, and the path in it with underscores."""
    path = path.replace(".processor", "")
    while path.startswith("base_model.model."):
        path = path.removeprefix("base_model.model.")
    flat = path.replace(".", "_").removeprefix("lycoris_")
    for prefix, scope in _PREFIXES:
        if flat.startswith(prefix):
            return scope, flat.removeprefix(prefix)
    return "unet", flat
