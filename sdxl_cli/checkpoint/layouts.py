"""The names tensors have in the original single file and in a diffusers folder, and the way from one to the other.

A plan says, for every tensor of the target layout, which tensors of the source it is made of; applying it is left
to the reader, so that nothing is read or copied before it is wanted. Facts: facts.md sections 2 and 3; checked
against the published key lists of both layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sdxl_cli.model.config import UNetConfig, VAEConfig

Change = Literal["same", "squeeze", "unsqueeze", "transpose", "join", "split"]


@dataclass(frozen=True, slots=True)
class Source:
    """What one tensor of the target layout is made of."""

    keys: tuple[str, ...]
    change: Change = "same"
    part: int = 0
    """Which third of the rows, for ``split``."""

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape after the change, from the shapes of the source layout."""
        first = shapes[self.keys[0]]
        match self.change:
            case "same":
                return first
            case "squeeze":
                return first[:2] if first[2:] == (1, 1) else first
            case "unsqueeze":
                return (*first, 1, 1) if len(first) == 2 else first
            case "transpose":
                return first[::-1]
            case "join":
                return (sum(shapes[key][0] for key in self.keys), *first[1:])
            case "split":
                return (first[0] // 3, *first[1:])


Plan = dict[str, Source]


def unet_to_original(keys: Iterable[str], config: UNetConfig) -> Plan:
    """diffusers ``unet/`` -> names below ``model.diffusion_model.``; unknown names stay as they are."""
    return _renamed(keys, _inverse(_unet_modules(config)))


def unet_to_diffusers(keys: Iterable[str], config: UNetConfig) -> Plan:
    """Names below ``model.diffusion_model.`` -> diffusers ``unet/``; unknown names stay as they are."""
    return _renamed(keys, _unet_modules(config))


def vae_to_original(keys: Iterable[str], config: VAEConfig) -> Plan:
    """diffusers ``vae/`` (also with its attention names of 2022) -> names below ``first_stage_model.``."""
    modules = _inverse(_vae_modules(config))
    for side in ("encoder", "decoder"):
        old, new = f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
        modules |= {f"{old}.query": f"{new}.q", f"{old}.key": f"{new}.k", f"{old}.value": f"{new}.v"}
        modules[f"{old}.proj_attn"] = f"{new}.proj_out"
    # 1x1 convolutions there, linear layers here
    return _changed(_renamed(keys, modules), _is_vae_attention_weight, "unsqueeze")


def vae_to_diffusers(keys: Iterable[str], config: VAEConfig) -> Plan:
    """Names below ``first_stage_model.`` -> diffusers ``vae/``."""
    plan = _renamed(keys, _vae_modules(config))
    return {
        name: Source(source.keys, "squeeze") if _is_vae_attention_weight(source.keys[0]) else source
        for name, source in plan.items()
    }


def clip_l_to_original(keys: Iterable[str]) -> Plan:
    """transformers ``text_encoder/``, with or without ``text_model.`` -> names below ``…transformer.``."""
    return {_with_text_model(key): Source((key,)) for key in keys}


def clip_l_to_diffusers(keys: Iterable[str]) -> Plan:
    """Names below ``conditioner.embedders.0.transformer.`` -> transformers ``text_encoder/``."""
    return {key: Source((key,)) for key in keys if not key.endswith("position_ids")}


def big_g_to_original(keys: Iterable[str]) -> Plan:
    """transformers ``text_encoder_2/`` -> OpenCLIP names below ``conditioner.embedders.N.model.``.

    The query, key and value rows become one matrix and the projection is transposed.
    """
    plan: Plan = {}
    known = {_with_text_model(key): key for key in keys}
    for name, key in known.items():
        layer, _, tail = name.rpartition(".self_attn.")
        module, _, kind = tail.partition(".")
        if module == "q_proj":
            parts = tuple(known.get(f"{layer}.self_attn.{p}_proj.{kind}", "") for p in "qkv")
            if all(parts):
                plan[f"{_replace(layer, _BIG_G)}.attn.in_proj_{kind}"] = Source(parts, "join")
                continue
        if module in ("k_proj", "v_proj") and f"{layer}.self_attn.q_proj.{kind}" in known:
            continue
        if name == "text_projection.weight":
            plan["text_projection"] = Source((key,), "transpose")
        elif not name.endswith("position_ids"):
            plan[_BIG_G_TABLES.get(name) or _replace(name, _BIG_G)] = Source((key,))
    return plan


def big_g_to_diffusers(keys: Iterable[str]) -> Plan:
    """OpenCLIP names below ``conditioner.embedders.N.model.`` -> transformers ``text_encoder_2/``.

    ``logit_scale`` is left out: it is used by nothing and transformers has no place for it.
    """
    inner = {new: old for old, new in _BIG_G.items()}
    tables = {new: old for old, new in _BIG_G_TABLES.items()}
    plan: Plan = {}
    for key in keys:
        block, _, kind = key.rpartition(".attn.in_proj_")
        if block:
            layer = _replace(block, inner)
            plan |= {
                f"{layer}.self_attn.{p}_proj.{kind}": Source((key,), "split", part)
                for part, p in enumerate("qkv")
            }
        elif key == "text_projection":
            plan["text_projection.weight"] = Source((key,), "transpose")
        elif key != "logit_scale":
            plan[tables.get(key) or _replace(key, inner)] = Source((key,))
    return plan


def prefixed(plan: Plan, prefix: str) -> Plan:
    """The plan with ``prefix`` before every target name."""
    return {prefix + name: source for name, source in plan.items()}


_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""Inside a U-Net residual block: original, diffusers."""

_BIG_G = {
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "text_model.final_layer_norm": "ln_final",
}
"""transformers, OpenCLIP."""

_BIG_G_TABLES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}


def _unet_modules(config: UNetConfig) -> dict[str, str]:
    """Every renamed module of the U-Net: original path -> diffusers path."""
    modules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }
    modules |= _res_block("middle_block.0", "mid_block.resnets.0")
    modules |= _res_block("middle_block.2", "mid_block.resnets.1")
    blocks, levels = config.num_res_blocks, len(config.channel_mult)
    for level, depth in enumerate(config.transformer_depth):
        down = 1 + level * (blocks + 1)
        for index in range(blocks):
            modules |= _res_block(f"input_blocks.{down + index}.0", f"down_blocks.{level}.resnets.{index}")
            modules[f"input_blocks.{down + index}.1"] = f"down_blocks.{level}.attentions.{index}"
        modules[f"input_blocks.{down + blocks}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        # the way up starts at the deepest level
        stage = levels - 1 - level
        up = stage * (blocks + 1)
        for index in range(blocks + 1):
            modules |= _res_block(f"output_blocks.{up + index}.0", f"up_blocks.{stage}.resnets.{index}")
            if depth:
                modules[f"output_blocks.{up + index}.1"] = f"up_blocks.{stage}.attentions.{index}"
        upsample = 2 if depth else 1
        modules[f"output_blocks.{up + blocks}.{upsample}.conv"] = f"up_blocks.{stage}.upsamplers.0.conv"
    return modules


def _vae_modules(config: VAEConfig) -> dict[str, str]:
    """Every renamed module of the autoencoder: original path -> diffusers path."""
    modules: dict[str, str] = {}
    levels, blocks = len(config.channel_mult), config.num_res_blocks
    for side in ("encoder", "decoder"):
        middle = f"{side}.mid_block"
        modules |= {
            f"{side}.mid.block_1": f"{middle}.resnets.0",
            f"{side}.mid.block_2": f"{middle}.resnets.1",
            f"{side}.mid.attn_1.norm": f"{middle}.attentions.0.group_norm",
            f"{side}.mid.attn_1.proj_out": f"{middle}.attentions.0.to_out.0",
            f"{side}.norm_out": f"{side}.conv_norm_out",
        }
        modules |= {f"{side}.mid.attn_1.{p}": f"{middle}.attentions.0.to_{p}" for p in "qkv"}
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{level}"
        # diffusers counts the decoder's levels in the order they run
        new_down, new_up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        modules[f"{down}.downsample.conv"] = f"{new_down}.downsamplers.0.conv"
        modules[f"{up}.upsample.conv"] = f"{new_up}.upsamplers.0.conv"
        for old, new, count in ((down, new_down, blocks), (up, new_up, blocks + 1)):
            for index in range(count):
                modules[f"{old}.block.{index}"] = f"{new}.resnets.{index}"
                modules[f"{old}.block.{index}.nin_shortcut"] = f"{new}.resnets.{index}.conv_shortcut"
    return modules


def _res_block(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{inner}": f"{new}.{outer}" for inner, outer in _RES_BLOCK.items()}


def _inverse(modules: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in modules.items()}


def _renamed(keys: Iterable[str], modules: Mapping[str, str]) -> Plan:
    """Replace the longest known module path at the start of every key."""
    plan: Plan = {}
    for key in keys:
        known = next((path for path in _paths(key) if path in modules), None)
        plan[key if known is None else modules[known] + key[len(known) :]] = Source((key,))
    return plan


def _paths(key: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b``, ``a``."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _changed(plan: Plan, wanted: Callable[[str], bool], change: Change) -> Plan:
    return {name: Source(source.keys, change) if wanted(name) else source for name, source in plan.items()}


def _is_vae_attention_weight(name: str) -> bool:
    return ".attn_1." in name and ".norm." not in name and name.endswith(".weight")


def _with_text_model(key: str) -> str:
    """transformers 5 writes a text tower without ``text_model.``, every other version with it."""
    return f"text_model.{key}" if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def _replace(name: str, names: Mapping[str, str]) -> str:
    """Replace every known run of whole path components."""
    dotted = f".{name}."
    for old, new in names.items():
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]
