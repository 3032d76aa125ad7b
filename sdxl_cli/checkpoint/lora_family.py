"""Which kind of model a LoRA was made for, told from the names and shapes of its tensors.

U-Nets differ in the width of the text features that their cross-attention reads: SD 1 768, SD 2 1024, the SDXL
refiner 1280, SDXL 2048. Transformers have other names altogether.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdxl_cli.checkpoint.lora_keys import LoraLayer

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LoraFamily:
    """What a LoRA was made for."""

    label: str
    """For messages: ``SDXL``, ``Stable Diffusion 1``; empty when nothing in the file tells."""
    context_dim: int | None = None
    """Width of the text features it expects; None when it changes no cross-attention."""
    is_foreign: bool = False
    """Whether it is for something without SDXL's U-Net."""


def lora_family(layers: Sequence[LoraLayer], shapes: Shapes, metadata: Mapping[str, str]) -> LoraFamily:
    """Say what a LoRA was made for: by its tensors; only where they do not tell, by what its metadata claims."""
    names = [layer.name.replace(".", "_") for layer in layers]
    for pattern, label in _TRANSFORMERS:
        if any(pattern.search(name) for name in names):
            return LoraFamily(label, is_foreign=True)
    widths = Counter(width for layer in layers if (width := _context_width(layer, shapes)))
    if widths:
        width = widths.most_common(1)[0][0]
        return LoraFamily(_WIDTHS.get(width, f"a model with text features {width} wide"), width)
    scopes = {layer.scope for layer in layers}
    if scopes == {"elsewhere"}:
        return LoraFamily("another architecture than SDXL", is_foreign=True)
    return LoraFamily(_claimed(metadata) or ("SDXL" if "big_g" in scopes else ""))


def inputs(layer: LoraLayer, shapes: Shapes) -> int | None:
    """How many features the changed layer reads; None when its tensors do not tell."""
    shape = {role: shapes[key] for role, key in layer.keys.items()}
    for role in ("down", "hada_w1_b", "diff"):
        if len(shape.get(role, ())) >= 2:
            return shape[role][1]
    first = shape.get("lokr_w1") or shape.get("lokr_w1_b")
    second = shape.get("lokr_w2") or shape.get("lokr_w2_b")
    if first and second and len(first) >= 2 and len(second) >= 2:
        return first[1] * second[1]
    return None


def _context_width(layer: LoraLayer, shapes: Shapes) -> int | None:
    return inputs(layer, shapes) if _CROSS_ATTENTION.search(layer.module) else None


def _claimed(metadata: Mapping[str, str]) -> str:
    text = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    return next((label for mark, label in _CLAIMS if mark in text), "")


_CROSS_ATTENTION = re.compile(r"attn2_to_[kv]$")

_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}

_TRANSFORMERS = tuple(
    (re.compile(pattern), label)
    for pattern, label in (
        (r"(double|single)_blocks_\d|single_transformer_blocks_\d", "Flux"),
        (r"joint_blocks_\d", "Stable Diffusion 3"),
        (r"(img|txt)_mlp_", "Qwen-Image"),
        (r"^(lora_)?transformer_.*add_[kqv]_proj", "Stable Diffusion 3"),
        (r"blocks_\d+_cross_attn_[kqv]($|_)", "Wan"),
        (r"^(lora_)?transformer_", "a transformer model, not a U-Net"),
    )
)
"""Layers that only these have."""

_CLAIMS = (
    ("sdxl", "SDXL"),
    ("stable-diffusion-xl", "SDXL"),
    ("flux", "Flux"),
    ("sd3", "Stable Diffusion 3"),
    ("stable-diffusion-3", "Stable Diffusion 3"),
    ("sd_v1", "Stable Diffusion 1"),
    ("stable-diffusion-v1", "Stable Diffusion 1"),
    ("sd_v2", "Stable Diffusion 2"),
    ("stable-diffusion-v2", "Stable Diffusion 2"),
)
