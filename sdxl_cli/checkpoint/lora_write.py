"""LoRA files to write: the tensor names of kohya's sd-scripts, which every front end reads, and those of diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdxl_cli.checkpoint.stream import BODY_HASH
from sdxl_cli.checkpoint.write import config_note, modelspec, save_tensors
from sdxl_cli.model.config import ModelConfig

LoraLayout = Literal["kohya", "diffusers"]

_KOHYA = {"unet": "lora_unet", "clip_l": "lora_te1", "big_g": "lora_te2"}
_DIFFUSERS = {"unet": "unet", "clip_l": "text_encoder", "big_g": "text_encoder_2"}
"""Network -> what its layers' names begin with."""


@dataclass(frozen=True, slots=True)
class LoraPlace:
    """A layer under the names that files have for it."""

    scope: str
    """``unet``, ``clip_l`` or ``big_g``."""
    path: str
    """With dots: the original's name in the U-Net, that of transformers in a text encoder. kohya's files have it."""
    diffusers: str
    """Its name in diffusers and transformers."""


@dataclass(frozen=True, slots=True)
class LoraChange:
    """What is added to the weight [O, I, ...] of a layer: alpha/rank · up · down, and DoRA's magnitudes."""

    place: LoraPlace
    down: Tensor
    """[rank, I, ...]."""
    up: Tensor
    """[O, rank]."""
    alpha: float
    magnitude: Tensor | None = None
    """[O]: the norm that each output's weights have in the end (DoRA)."""

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return len(self.down)


def save_lora(
    path: Path,
    changes: Sequence[LoraChange],
    config: ModelConfig,
    *,
    layout: LoraLayout,
    dtype: torch.dtype | None = None,
    title: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA as one safetensors file.

    Args:
        path: replaced when it exists.
        changes: one for each layer.
        config: of the model that it changes.
        layout: whose names the tensors have.
        dtype: casts all but alphas and magnitudes; None keeps each one's own.
        title: ``modelspec.title``; default the file's name.
        metadata: added to ``modelspec.…``.

    Raises:
        FileError, SdxlError: the file cannot be written, or the disk is full.
    """
    notes = modelspec(path, config, title) | config_note(config)
    notes["modelspec.architecture"] += "/lora"
    tensors = {
        name: value if dtype is None or name.endswith(_EXACT) else value.to(dtype)
        for change in changes
        for name, value in _LAYOUTS[layout](change).items()
    }
    if layout == "diffusers":
        notes["lora_adapter_metadata"] = json.dumps(adapter_metadata(changes))
    save_tensors(path, tensors, notes | dict(metadata or {}) | {"sshs_model_hash": BODY_HASH})


_EXACT = (".alpha", ".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
"""Numbers that rounding to half precision would move more than what was learned of them."""


def _kohya(change: LoraChange) -> dict[str, Tensor]:
    name = f"{_KOHYA[change.place.scope]}_{change.place.path.replace('.', '_')}"
    tensors = {
        f"{name}.lora_down.weight": change.down,
        f"{name}.lora_up.weight": _like(change.up, change.down),
        f"{name}.alpha": torch.tensor(float(change.alpha)),
    }
    if change.magnitude is not None:
        # LyCORIS's name and shape: [O, 1, ...] says that the norm is that of each output
        tensors[f"{name}.dora_scale"] = _like(change.magnitude[:, None], change.down)
    return tensors


def _diffusers(change: LoraChange) -> dict[str, Tensor]:
    name = f"{_DIFFUSERS[change.place.scope]}.{change.place.diffusers}"
    tensors = {
        f"{name}.lora_A.weight": change.down,
        f"{name}.lora_B.weight": _like(change.up, change.down),
    }
    if change.magnitude is not None:
        spatial = change.down.ndim == 4
        # transformers reads the name of the parameter in PEFT's module, diffusers what PEFT writes for it
        ending = "" if change.place.scope == "unet" else ".weight"
        tensors[f"{name}.lora_magnitude_vector{ending}"] = (
            change.magnitude[None, :, None, None] if spatial else change.magnitude
        )
    return tensors


_LAYOUTS = {"kohya": _kohya, "diffusers": _diffusers}


def _like(matrix: Tensor, down: Tensor) -> Tensor:
    """A matrix as a 1x1 convolution, beside a ``down`` that is a convolution."""
    return matrix.reshape(*matrix.shape, *[1] * (down.ndim - 2))


def _ending(change: LoraChange) -> str:
    """How the layer's path ends in every version of transformers: the fifth has no ``text_model.`` any more."""
    return change.place.diffusers.removeprefix("text_model.")


def adapter_metadata(changes: Sequence[LoraChange]) -> dict[str, Any]:
    """PEFT's configuration of each network's adapter, under its prefix: alpha is nowhere else in this layout."""
    found: dict[str, Any] = {}
    for scope, prefix in _DIFFUSERS.items():
        mine = [change for change in changes if change.place.scope == scope]
        if not mine:
            continue
        first = mine[0]
        values: dict[str, Any] = {
            "peft_type": "LORA",
            "r": first.rank,
            "lora_alpha": first.alpha,
            "target_modules": [_ending(change) for change in mine],
            "rank_pattern": {_ending(c): c.rank for c in mine if c.rank != first.rank},
            "alpha_pattern": {_ending(c): c.alpha for c in mine if c.alpha != first.alpha},
            "use_dora": first.magnitude is not None,
        }
        found |= {f"{prefix}.{key}": value for key, value in values.items()}
    return found
