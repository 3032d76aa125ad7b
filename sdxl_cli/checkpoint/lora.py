"""LoRA files: read, fitted to a model, and merged into its weights as they are loaded.

A file is opened and compared with a model's table of contents first, so that one for another architecture is refused
before anything is loaded. Merging is done tensor by tensor in fp32; files are never changed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_cli.checkpoint.files import ModelFiles, remembered_sha256
from sdxl_cli.checkpoint.lora_algorithms import (
    ALGORITHMS,
    NUMBERS,
    Change,
    algorithm_of,
    bias_change,
    bias_role,
)
from sdxl_cli.checkpoint.lora_family import LoraFamily, lora_family
from sdxl_cli.checkpoint.lora_keys import LoraLayer, group_layers
from sdxl_cli.checkpoint.lora_targets import Slot, Slots, slots
from sdxl_cli.checkpoint.read import open_tensors
from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import PREFIXES, ModelConfig

_IN_FOLDER = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the file in a folder they write."""
_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration in the file itself."""


class Lora:
    """A LoRA file of any family. Tensors are read when they are merged."""

    def __init__(self, path: Path) -> None:
        """Read the table of contents.

        Args:
            path: a safetensors file, or a folder that diffusers or PEFT wrote.

        Raises:
            FileError: missing, damaged, or no LoRA.
        """
        self.path = _file_in(path)
        self.name = self.path.stem if self.path.name not in _IN_FOLDER else self.path.resolve().parent.name
        self.tensors = TensorFile(self.path)
        self.metadata = self.tensors.metadata
        """As the trainer wrote it: kohya's ``ss_…``, ``modelspec.…``."""
        self.layers, self.others = group_layers(self.tensors.shapes)
        if not any(_is_change(layer) for layer in self.layers):
            raise FileError(
                f"{self.path} is no LoRA: none of its {len(self.tensors.shapes)} tensors changes a layer"
            )
        self._config = _adapter_config(self.path, self.metadata)

    @property
    def family(self) -> LoraFamily:
        """What it was made for."""
        return lora_family(self.layers, self.tensors.shapes, self.metadata)

    @property
    def kind(self) -> str:
        """Its algorithms and ranks, the most frequent first: ``rank 16``, ``rank 8 LoHa, norm``."""
        kinds = Counter(text for layer in self.layers if (text := self._kind(layer)))
        names = [name for name, _ in kinds.most_common(3)]
        return ", ".join(names) + (", …" if len(kinds) > 3 else "")

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole file."""
        return remembered_sha256(self.path)

    @cached_property
    def short_hash(self) -> str:
        """A1111's hash of a LoRA: 12 digits of that of the tensors alone, so that metadata may be edited."""
        known = self.metadata.get("sshs_model_hash", "")
        return (known if re.fullmatch(r"[0-9a-f]{64}", known) else remembered_sha256(self.path, body=True))[
            :12
        ]

    def numbers(self, layer: LoraLayer) -> dict[str, float]:
        """The single numbers of a layer (alpha, …), and its rank; from PEFT's configuration what the file lacks."""
        numbers = {
            role: float(self.tensors.read(key, torch.float32).flatten()[0])
            for role, key in layer.keys.items()
            if role in NUMBERS and 0 not in self.tensors.shapes[key]
        }
        if (rank := self.rank(layer)) is not None:
            numbers["rank"] = rank
            if "alpha" not in numbers and (alpha := _configured_alpha(self._config, layer, rank)) is not None:
                numbers["alpha"] = alpha
        return numbers

    def rank(self, layer: LoraLayer) -> int | None:
        """Rank of a layer's change; None for one in full."""
        algorithm = algorithm_of(frozenset(layer.keys))
        roles = [] if algorithm is None else [role for role in algorithm.rank_from if role in layer.keys]
        shape = self.tensors.shapes[layer.keys[roles[0]]] if roles else ()
        return shape[0] if shape else None

    def _kind(self, layer: LoraLayer) -> str:
        algorithm, rank = algorithm_of(frozenset(layer.keys)), self.rank(layer)
        if algorithm is None:
            return ""
        dora = "dora_scale" in layer.keys or "magnitude" in layer.keys
        name = (
            ("DoRA" if algorithm is ALGORITHMS[0] else f"{algorithm.name} with DoRA")
            if dora
            else algorithm.name
        )
        if rank is None:
            return name
        return f"rank {rank}" + ("" if name == "LoRA" else f" {name}")


def is_lora_file(path: Path) -> bool:
    """Whether this is a LoRA, a safetensors file or a folder of one; nothing else is an error."""
    if not path.exists() or path.suffix in (".ckpt", ".pt") or (path / "model_index.json").exists():
        return False
    try:
        Lora(path)
    except FileError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Edit:
    """One change of one parameter."""

    layer: LoraLayer
    slot: Slot
    change: Change
    numbers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class FittedLora:
    """A LoRA and the parameters of a model it changes."""

    lora: Lora
    edits: Mapping[str, Sequence[_Edit]]
    """By parameter, under the name of the single file."""
    total: int
    """Layers in the file."""
    unmatched: tuple[str, ...]
    """Those the model does not have or has in another shape, and tensors that belong to no layer; as the file
    writes them."""

    @property
    def matched(self) -> int:
        """Layers that are used."""
        return self.total - len(self.unmatched)


def fit(lora: Lora, files: ModelFiles) -> FittedLora:
    """Find the parameters a LoRA changes, and check every shape. Nothing is loaded.

    Raises:
        FileError: it was made for another architecture, or changes nothing of this model.
    """
    return fit_to(lora, open_tensors(files).shapes, files.config, files.name)


def fit_to(
    lora: Lora, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, model_name: str
) -> FittedLora:
    """:func:`fit` for a model known by the shapes of its tensors, under the names of the single file."""
    _require_family(lora, config, model_name)
    table = slots(shapes, config)
    edits: dict[str, list[_Edit]] = {}
    unmatched = []
    for layer in lora.layers:
        found = _edits(lora, layer, table)
        if not found:
            unmatched.append(layer.name)
        for edit in found:
            edits.setdefault(edit.slot.parameter, []).append(edit)
    total = len(lora.layers) + len(lora.others)
    unmatched += lora.others
    if not edits:
        raise FileError(
            f"{lora.path} ({lora.kind}) changes nothing of {model_name}: none of its {total} layers is there in "
            f"that shape ({first_names(unmatched)}); use one made for this model"
        )
    return FittedLora(lora, edits, total, tuple(unmatched))


@dataclass(frozen=True, slots=True)
class WornLora:
    """A fitted LoRA, and how much of it is wanted."""

    fitted: FittedLora
    scale: float
    """Of its change to the U-Net; 1 is what was trained."""
    text_scale: float
    """Of its change to the text encoders."""


class LoraMerge:
    """What several LoRAs make of a model's parameters, in their order."""

    def __init__(self, worn: Iterable[WornLora]) -> None:
        self._worn = list(worn)

    def changes(self, name: str) -> bool:
        """Whether the parameter of this name is changed."""
        return any(name in one.fitted.edits and _scale(one, name) for one in self._worn)

    def __call__(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter with all changes, in fp32; ``parameter`` itself stays as it is.

        Raises:
            FileError: a tensor of the LoRA is not finite.
        """
        result = parameter.to(torch.float32, copy=True).contiguous()
        for one in self._worn:
            scale = _scale(one, name)
            for edit in one.fitted.edits.get(name, ()) if scale else ():
                parts = _read(one.fitted.lora, edit.layer, result.device)
                view = edit.slot.view(result)
                view += edit.change(parts, edit.numbers, view, scale)
        return result


def first_names(names: Sequence[str], count: int = 3) -> str:
    """A few of the names, for messages."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _scale(worn: WornLora, name: str) -> float:
    return worn.text_scale if name.startswith(PREFIXES["text"]) else worn.scale


def _read(lora: Lora, layer: LoraLayer, device: torch.device) -> dict[str, Tensor]:
    parts = {}
    for role, key in layer.keys.items():
        if role not in NUMBERS:
            parts[role] = lora.tensors.read(key, torch.float32).to(device)
            if not torch.isfinite(parts[role]).all():
                raise FileError(
                    f"{lora.path}: {key} has NaN or infinity in it; the file is broken, do not use it"
                )
    return parts


def _edits(lora: Lora, layer: LoraLayer, table: Slots) -> list[_Edit]:
    """The changes a layer's tensors make; none when any of them fits nowhere."""
    roles = frozenset(layer.keys)
    algorithm, bias = algorithm_of(roles), bias_role(roles)
    known = {bias} | (algorithm.reads if algorithm else NUMBERS)
    place = table.get((layer.scope, layer.module))
    wanted: dict[str, Change] = {"weight": algorithm.change} if algorithm else {}
    if bias:
        wanted["bias"] = bias_change
    if place is None or not wanted or not wanted.keys() <= place.keys() or not roles <= known:
        return []
    numbers = lora.numbers(layer)
    edits = [_Edit(layer, place[kind], change, numbers) for kind, change in wanted.items()]
    return edits if all(_has_the_shape(lora, edit) for edit in edits) else []


def _has_the_shape(lora: Lora, edit: _Edit) -> bool:
    """Go through the change without numbers: on the meta device."""
    shapes, layer = lora.tensors.shapes, edit.layer
    parts = {
        role: torch.empty(shapes[key], device="meta")
        for role, key in layer.keys.items()
        if role not in NUMBERS
    }
    weight = torch.empty(edit.slot.shape, device="meta")
    try:
        return edit.change(parts, edit.numbers, weight, 1.0).shape == weight.shape
    except (RuntimeError, ValueError, IndexError):
        return False


def _require_family(lora: Lora, config: ModelConfig, model_name: str) -> None:
    family = lora.family
    if family.is_foreign or family.context_dim not in (None, config.unet.context_dim):
        kind = f", {lora.kind}" if lora.kind else ""
        raise FileError(
            f"{lora.path} is a LoRA for {family.label}{kind}, and does not fit {model_name}; "
            f"use one made for {'the SDXL refiner' if config.is_refiner else 'SDXL'}"
        )


def _is_change(layer: LoraLayer) -> bool:
    roles = frozenset(layer.keys)
    return algorithm_of(roles) is not None or bias_role(roles) is not None


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = [name for name in _IN_FOLDER if (path / name).is_file()]
    if not names:
        raise FileError(f"{path} is a folder without {' or '.join(_IN_FOLDER)}; give a LoRA file")
    return path / names[0]


# PEFT's configuration -----------------------------------------------------------------------------

_PARTS = {"unet": "unet", "clip_l": "text_encoder", "big_g": "text_encoder_2", "elsewhere": ""}
"""Network -> what diffusers puts before every key of its configuration."""


def _adapter_config(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """PEFT's ``LoraConfig``, from the file's metadata or from beside the file; empty when there is none."""
    beside = path.parent / _CONFIG
    try:
        if _METADATA in metadata:
            values = json.loads(metadata[_METADATA])
        elif path.name == _IN_FOLDER[1] and beside.is_file():
            values = json.loads(beside.read_text("utf-8"))
        else:
            return {}
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: its configuration of the adapter is damaged ({error})") from error
    if not isinstance(values, dict):
        raise FileError(f"{path}: its configuration of the adapter is no JSON object")
    return values


def _configured_alpha(config: Mapping[str, Any], layer: LoraLayer, rank: int) -> float | None:
    """Alpha of a layer, as PEFT scales: alpha/rank, or alpha/sqrt(rank) for rank-stabilised LoRA."""

    def value(name: str) -> Any:
        return config.get(f"{_PARTS[layer.scope]}.{name}", config.get(name))

    patterns = value("alpha_pattern") or {}
    # PEFT: a pattern is a regular expression for the end of a layer's path
    special = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", layer.name)), None)
    alpha = patterns[special] if special is not None else value("lora_alpha")
    if alpha is None:
        alpha = value("alpha")
    if alpha is None:
        return None
    return float(alpha) * (math.sqrt(rank) if value("use_rslora") else 1.0)
