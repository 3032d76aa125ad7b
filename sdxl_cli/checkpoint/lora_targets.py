"""The parameters of a model under every name a LoRA may call their layers by.

Derived from the tensors a model's file has, so that any size of SDXL has its own list: the names of the original single
file and those of diffusers and transformers, as :mod:`sdxl_cli.checkpoint.layouts` relates them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from sdxl_cli.checkpoint.identify import CLIP_L, UNET, big_g_prefix
from sdxl_cli.checkpoint.layouts import Plan, Source, big_g_to_diffusers, unet_to_diffusers
from sdxl_cli.checkpoint.lora_keys import Scope
from sdxl_cli.model.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter, or the rows of one, as the layer that a LoRA names sees it."""

    parameter: str
    """Name in the single file."""
    source: Source
    """How the layer's own tensor comes out of the parameter."""
    shape: tuple[int, ...]
    """Of the layer's own tensor."""

    def view(self, parameter: Tensor) -> Tensor:
        """The layer's tensor, sharing the memory of ``parameter``."""
        match self.source.change:
            case "split":
                return parameter.chunk(3)[self.source.part]
            case "transpose":
                return parameter.T
            case _:
                return parameter.view(self.shape)


Slots = dict[tuple[Scope, str], dict[str, Slot]]
"""(network, layer with underscores) -> ``weight`` and ``bias``."""


def slots(shapes: Shapes, config: ModelConfig) -> Slots:
    """Every layer of a model that a LoRA can change.

    Args:
        shapes: the model's tensors, under the names of the single file.
        config: its sizes.
    """
    found: Slots = {}
    for scope, prefix, plan in _plans(shapes, config):
        below = {
            name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)
        }
        for name, source in plan.items():
            module, _, kind = name.rpartition(".")
            if kind not in ("weight", "bias"):
                continue
            slot = Slot(prefix + source.keys[0], source, source.shape(below))
            for alias in _aliases(module.replace(".", "_")):
                found.setdefault((scope, alias), {}).setdefault(kind, slot)
    return found


def _plans(shapes: Shapes, config: ModelConfig) -> Iterator[tuple[Scope, str, Plan]]:
    """Network, its prefix in the single file, and a way to name its tensors."""
    towers: list[tuple[Scope, str]] = [("clip_l", CLIP_L)] if config.clip_l else []
    places: list[tuple[Scope, str]] = [("unet", UNET), *towers, ("big_g", big_g_prefix(config))]
    for scope, prefix in places:
        names = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
        yield scope, prefix, {name: Source((name,)) for name in names}
        if scope == "unet":
            yield scope, prefix, unet_to_diffusers(names, config.unet)
        if scope == "big_g":
            yield scope, prefix, big_g_to_diffusers(names)


_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""transformers, and what diffusers called it in its first LoRA files."""


def _aliases(module: str) -> Iterator[str]:
    """The name, and what older files write for it."""
    yield module
    if module.endswith("_to_out_0"):
        yield module.removesuffix("_0")
    if module.startswith("text_model_"):
        # transformers 5 writes a text tower without this level
        yield module.removeprefix("text_model_")
        block, _, projection = module.rpartition("self_attn_")
        if block and projection in _OLD_TEXT:
            yield f"{block}self_attn_{_OLD_TEXT[projection]}"
