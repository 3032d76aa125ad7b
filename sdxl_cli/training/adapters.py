"""Which layers get an adapter, and what those are called in the files that people exchange."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from sdxl_cli.checkpoint.identify import CLIP_L, big_g_prefix
from sdxl_cli.checkpoint.layouts import Plan, big_g_to_diffusers, clip_l_to_diffusers, unet_to_diffusers
from sdxl_cli.checkpoint.lora_write import LoraPlace
from sdxl_cli.errors import UsageError, unknown
from sdxl_cli.model.config import PREFIXES
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.unet import GEGLU, Downsample, Upsample
from sdxl_cli.training.adapted import (
    AdaptedConv,
    AdaptedLinear,
    Adapter,
    CalledAttention,
    CalledDownsample,
    CalledGEGLU,
    CalledUpsample,
)
from sdxl_cli.training.config import LoraConfig

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"),
    "feedforward": ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2"),
    "projections": ("proj_in", "proj_out"),
    "convolutions": (
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
    ),
    "embeddings": (
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "add_embedding.linear_1",
        "add_embedding.linear_2",
    ),
    "ends": ("conv_in", "conv_out"),
}
"""Names of targets -> how the paths of their layers end, as diffusers and transformers call them."""

_CALLING: dict[type[nn.Module], type[nn.Module]] = {
    GEGLU: CalledGEGLU,
    Downsample: CalledDownsample,
    Upsample: CalledUpsample,
}
"""Modules that take the weight out of a layer -> those that ask the layer."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that can have an adapter."""

    place: LoraPlace
    module: str
    """Its path in the model; of queries, keys and values in one, that of the attention."""
    part: str = ""
    """``q``, ``k`` or ``v`` of such an attention."""


def add_adapters(model: SDXL, config: LoraConfig, parts: list[str]) -> dict[str, tuple[LoraPlace, Adapter]]:
    """Put adapters into a model. Everything else of it is frozen.

    Args:
        model: changed in place.
        config: says which layers, and what adapters.
        parts: names of the networks that get some: ``unet``, ``clip_l``, ``big_g``.

    Returns:
        How the names of an adapter's parameters begin -> the layer's names in files, and the adapter.

    Raises:
        UsageError: a target is of no layer.
    """
    model.requires_grad_(False)
    layers = [layer for layer in _layers(model) if layer.place.scope in parts]
    chosen = {id(layer): layer for target in config.targets for layer in _matching(layers, target)}
    found = {}
    for layer in layers:
        if id(layer) in chosen:
            path, adapter = _adapted(model, layer, config)
            found[f"{path}."] = (layer.place, adapter)
    return found


def _layers(model: SDXL) -> Iterator[_Layer]:
    """Every linear layer and convolution of the U-Net and the text encoders, in the model's order."""
    for scope, prefix, plan in _plans(model):
        for name, source in plan.items():
            outside, _, kind = name.rpartition(".")
            path, _, _ = source.keys[0].rpartition(".")
            if kind != "weight":
                continue
            module = model.get_submodule(f"{prefix}{path}".rstrip("."))
            # U-Nets are known by the original's names, text encoders by those of transformers
            place = LoraPlace(scope, path if scope == "unet" else outside, outside)
            if source.change == "split":
                yield _Layer(place, prefix + path, "qkv"[source.part])
            elif source.change == "same" and isinstance(module, nn.Linear | nn.Conv2d):
                yield _Layer(place, prefix + path)


def _plans(model: SDXL) -> Iterator[tuple[str, str, Plan]]:
    """Network, its prefix in the model, and its tensors as diffusers calls them."""
    names = list(model.state_dict())

    def below(prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    yield "unet", PREFIXES["unet"], unet_to_diffusers(below(PREFIXES["unet"]), model.config.unet)
    if model.config.clip_l:
        yield "clip_l", CLIP_L, clip_l_to_diffusers(below(CLIP_L))
    big_g = big_g_prefix(model.config)
    yield "big_g", big_g, big_g_to_diffusers(below(big_g))


def _matching(layers: list[_Layer], target: str) -> list[_Layer]:
    """The layers that a target means: a group, the end of a path as PEFT takes it, or a pattern with ``*``."""
    endings = GROUPS.get(target, (target,))

    def means(layer: _Layer) -> bool:
        names = (layer.place.diffusers, layer.place.path)
        if "*" in target:
            return any(fnmatchcase(f"{layer.place.scope}.{name}", target) for name in names)
        return any(f".{name}".endswith(f".{ending}") for name in names for ending in endings)

    found = [layer for layer in layers if means(layer)]
    if not found and target not in GROUPS:
        if "*" in target:
            raise UsageError(f"lora.targets: no layer of the trained networks has a name like {target}")
        raise unknown("target in lora.targets", target, [*GROUPS, *sorted(_last_names(layers))])
    return found


def _last_names(layers: list[_Layer]) -> set[str]:
    return {layer.place.diffusers.rpartition(".")[2] for layer in layers} - {"0", "2"}


def _adapted(model: SDXL, layer: _Layer, config: LoraConfig) -> tuple[str, Adapter]:
    """Put one adapter in; its path in the model, and the adapter."""
    holder, _, name = layer.module.rpartition(".")
    if layer.part:
        attention = _asked(model, layer.module)
        assert isinstance(attention, CalledAttention)
        adapter = _adapter(attention.third(layer.part), config)
        attention.adapters[layer.part] = adapter
        return f"{layer.module}.adapters.{layer.part}", adapter
    parent = _asked(model, holder)
    plain = parent.get_submodule(name)
    assert isinstance(plain, nn.Linear | nn.Conv2d)
    adapter = _adapter(plain.weight, config)
    adapted = AdaptedLinear(plain, adapter) if isinstance(plain, nn.Linear) else AdaptedConv(plain, adapter)
    setattr(parent, name, adapted)
    return f"{layer.module}.adapter", adapter


def _asked(model: SDXL, path: str) -> nn.Module:
    """The module of this path, in a kind that asks its layers."""
    module = model.get_submodule(path)
    holder, _, name = path.rpartition(".")
    asking: nn.Module
    if isinstance(module, nn.MultiheadAttention):
        asking = CalledAttention(module)
    elif type(module) in _CALLING:
        asking = _CALLING[type(module)](module)
    else:
        return module
    setattr(model.get_submodule(holder), name, asking)
    return asking


def _adapter(weight: Tensor, config: LoraConfig) -> Adapter:
    spatial = weight.ndim == 4 and tuple(weight.shape[2:]) != (1, 1)
    rank = (config.conv_rank or config.rank) if spatial else config.rank
    alpha = (config.conv_alpha or config.alpha) if spatial else config.alpha
    return Adapter(weight, rank, alpha or rank, dropout=config.dropout, dora=config.dora)


def adapter_counts(adapters: Mapping[str, tuple[LoraPlace, Adapter]]) -> str:
    """``722 layers of unet, 72 of clip_l; 23.4 M parameters``."""
    scopes = [place.scope for place, _ in adapters.values()]
    each = ", ".join(f"{scopes.count(scope)} layers of {scope}" for scope in dict.fromkeys(scopes))
    total = sum(p.numel() for _, adapter in adapters.values() for p in adapter.parameters())
    return f"{each}; {total / 1e6:.2f} M parameters"
