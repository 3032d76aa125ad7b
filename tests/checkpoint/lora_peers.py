"""One small model twice: ours, and diffusers' and transformers' networks with the same weights for others to adapt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdxl_cli.checkpoint.lora import FittedLora, Lora, LoraMerge, WornLora, fit_to
from sdxl_cli.model.embedding import sinusoidal
from sdxl_cli.model.sdxl import SDXL
from tests.checkpoint.conftest import SMALL
from tests.model.peers import (
    diffusers_unet,
    randomize,
    transformers_big_g,
    transformers_clip_l,
)

BOUND = 1e-4
"""What rounding may do: measured 1e-6 … 3e-5."""
VISIBLE = 0.05
"""What an adapter at least does to an output."""


NUMBERS = torch.tensor([[64.0, 96, 0, 8, 64, 96]])
"""Micro-conditions."""


class Outputs(NamedTuple):
    """What everything a LoRA can change gives for one input."""

    unet: Tensor
    clip_l: Tensor
    big_g: Tensor
    pooled: Tensor


def our_model() -> SDXL:
    model = SDXL(SMALL, ("unet", "text"))
    for seed, network in enumerate((model.unet, *model.conditioner.embedders.children())):
        randomize(network, stream=1.0, seed=seed)
    return model.eval()


class Theirs:
    """The networks of others, made anew for every test."""

    def __init__(self, model: SDXL) -> None:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        twin = SDXL(SMALL, ("unet", "text"))
        twin.load_state_dict(state, assign=True)
        clip_l, big_g = twin.conditioner.embedders.children()
        self.unet: Any = diffusers_unet(twin.unet, SMALL)
        self.clip_l: Any = transformers_clip_l(clip_l)
        self.big_g: Any = transformers_big_g(big_g)

    @torch.no_grad()
    def outputs(self) -> Outputs:
        x, t, context, y, ids = inputs()
        added = {"text_embeds": y[:, : SMALL.big_g.embed_dim], "time_ids": NUMBERS}
        sample = self.unet(x, t, context, added_cond_kwargs=added).sample
        big_g = self.big_g(ids, output_hidden_states=True)
        return Outputs(
            sample,
            self.clip_l(ids, output_hidden_states=True).hidden_states[-2],
            big_g.hidden_states[-2],
            big_g.text_embeds,
        )


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 77, SMALL.unet.context_dim, generator=generator)
    pooled = torch.randn(1, SMALL.big_g.embed_dim, generator=generator)
    y = torch.cat([pooled, sinusoidal(NUMBERS.flatten(), SMALL.scalar_dim).view(1, -1)], dim=1)
    ids = torch.randint(1, 118, (1, 77), generator=generator)
    ids[0, 0], ids[0, 9:] = 118, 119
    return x, torch.tensor([400]), context, y, ids


@torch.no_grad()
def our_outputs(model: SDXL) -> Outputs:
    x, t, context, y, ids = inputs()
    clip_l, big_g = model.conditioner.embedders.children()
    hidden, pooled = big_g(ids)
    return Outputs(model.unet(x, t, context, y), clip_l(ids), hidden, pooled)


def fitted(path: Path, model: SDXL) -> FittedLora:
    return fit_to(Lora(path), shapes_of(model.state_dict()), SMALL, "the small model")


def merged(model: SDXL, *loras: tuple[Path, float] | tuple[Path, float, float]) -> SDXL:
    """Our model with LoRAs merged into its weights: path, scale, scale of the text encoders."""
    return worn(model, *(WornLora(fitted(path, model), scales[0], scales[-1]) for path, *scales in loras))


def worn(model: SDXL, *loras: WornLora) -> SDXL:
    """Our model with fitted LoRAs merged into its weights."""
    merge = LoraMerge(loras)
    state = {
        name: merge(name, tensor) if merge.changes(name) else tensor
        for name, tensor in model.state_dict().items()
    }
    result = SDXL(SMALL, ("unet", "text"))
    result.load_state_dict(state, assign=True)
    return result.eval()


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def scramble(parameters: Any, *, std: float = 0.1, seed: int = 0) -> None:
    """Random values instead of a trainer's starting values, most of which change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
