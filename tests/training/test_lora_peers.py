"""What is trained as a LoRA is what diffusers and PEFT make of the file: outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from sdxl_cli.checkpoint.lora_write import LoraChange, LoraLayout, LoraPlace, save_lora
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.adapted import Adapter
from sdxl_cli.training.adapters import GROUPS, add_adapters
from sdxl_cli.training.config import LoraConfig
from tests.checkpoint.conftest import SMALL
from tests.checkpoint.lora_peers import (
    BOUND,
    NUMBERS,
    VISIBLE,
    Theirs,
    inputs,
    merged,
    our_model,
    our_outputs,
)
from tests.model.peers import relative

EVERYWHERE = LoraConfig(rank=3, alpha=5.0, conv_rank=2, conv_alpha=1.0, targets=tuple(GROUPS))
DORA = LoraConfig(rank=3, alpha=3.0, dora=True, targets=("attention", "feedforward", "projections"))
KOHYA_DEFAULT = LoraConfig(rank=3, alpha=5.0)

Adapters = Mapping[str, tuple[LoraPlace, Adapter]]


def adapted(config: LoraConfig) -> tuple[SDXL, Adapters]:
    """Our model with adapters of random values in all networks."""
    model = our_model()
    torch.manual_seed(3)
    adapters = add_adapters(model, config, ["unet", "clip_l", "big_g"])
    with torch.no_grad():
        for _, adapter in adapters.values():
            adapter.up.normal_(std=0.3)
            adapter.down.mul_(2.0)
            if adapter.magnitude is not None:
                adapter.magnitude.mul_(torch.empty_like(adapter.magnitude).uniform_(0.8, 1.3))
    return model, adapters


def changes(adapters: Adapters) -> list[LoraChange]:
    return [
        LoraChange(
            place,
            a.down.detach(),
            a.up.detach(),
            a.alpha,
            None if a.magnitude is None else a.magnitude.detach(),
        )
        for place, a in adapters.values()
    ]


def pipeline(path: Path) -> tuple[Theirs, Any]:
    """diffusers' pipeline of the same networks, with the file loaded as its users do."""
    theirs = Theirs(our_model())
    pipe = StableDiffusionXLPipeline(
        vae=None, text_encoder=theirs.clip_l, text_encoder_2=theirs.big_g, tokenizer=None,
        tokenizer_2=None, unet=theirs.unet, scheduler=None,
    )  # fmt: skip
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return theirs, pipe


CASES = [
    ("kohya", KOHYA_DEFAULT),
    ("diffusers", EVERYWHERE),
    ("diffusers", DORA),
    ("kohya", EVERYWHERE),
]


@pytest.mark.parametrize(("layout", "config"), CASES, ids=["kohya", "diffusers", "DoRA", "kohya-all"])
def test_diffusers_makes_of_the_file_what_was_trained(
    layout: LoraLayout, config: LoraConfig, tmp_path: Path
) -> None:
    model, adapters = adapted(config)
    path = tmp_path / "lora.safetensors"
    save_lora(path, changes(adapters), SMALL, layout=layout)
    theirs, _ = pipeline(path)
    for ours, expected, before in zip(
        our_outputs(model), theirs.outputs(), our_outputs(our_model()), strict=True
    ):
        assert relative(ours, expected) < BOUND
        assert relative(ours, before) > VISIBLE


@pytest.mark.parametrize("config", [EVERYWHERE, DORA], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_generation_makes_of_the_file_what_was_trained(
    layout: LoraLayout, config: LoraConfig, tmp_path: Path
) -> None:
    model, adapters = adapted(config)
    path = tmp_path / "lora.safetensors"
    save_lora(path, changes(adapters), SMALL, layout=layout)
    for ours, trained in zip(our_outputs(merged(our_model(), (path, 1.0))), our_outputs(model), strict=True):
        assert relative(ours, trained) < BOUND


def losses(unet: Tensor, clip_l: Tensor, big_g: Tensor, pooled: Tensor) -> Tensor:
    return unet.square().mean() + clip_l.square().mean() + big_g.square().mean() + pooled.sin().mean()


def their_loss(theirs: Theirs) -> Tensor:
    x, t, context, y, ids = inputs()
    added = {"text_embeds": y[:, : SMALL.big_g.embed_dim], "time_ids": NUMBERS}
    big_g = theirs.big_g(ids, output_hidden_states=True)
    return losses(
        theirs.unet(x, t, context, added_cond_kwargs=added).sample,
        theirs.clip_l(ids, output_hidden_states=True).hidden_states[-2],
        big_g.hidden_states[-2],
        big_g.text_embeds,
    )


def our_loss(model: SDXL) -> Tensor:
    x, t, context, y, ids = inputs()
    clip_l, big_g = model.conditioner.embedders.children()
    hidden, pooled = big_g(ids)
    return losses(model.unet(x, t, context, y), clip_l(ids), hidden, pooled)


def their_gradients(theirs: Theirs) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """(network, layer, part) and its gradient."""
    parts = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}
    networks: dict[str, nn.Module] = {"unet": theirs.unet, "clip_l": theirs.clip_l, "big_g": theirs.big_g}
    for scope, network in networks.items():
        for name, parameter in network.named_parameters():
            found = next((part for part in parts if f".{part}." in name), "")
            layer = name.partition(f".{found}.")[0]
            if found and parameter.grad is not None:
                yield (scope, layer.removeprefix("text_model."), parts[found]), parameter.grad


@pytest.mark.parametrize("config", [EVERYWHERE, DORA], ids=["LoRA", "DoRA"])
def test_gradients_are_those_of_peft(config: LoraConfig, tmp_path: Path) -> None:
    model, adapters = adapted(config)
    path = tmp_path / "lora.safetensors"
    save_lora(path, changes(adapters), SMALL, layout="diffusers")
    theirs, _ = pipeline(path)
    for network in (theirs.unet, theirs.clip_l, theirs.big_g):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name)
    mine, other = our_loss(model), their_loss(theirs)
    assert float(mine.detach()) == pytest.approx(float(other.detach()), rel=1e-5)
    mine.backward()
    other.backward()
    expected = dict(their_gradients(theirs))
    seen = 0
    for place, adapter in adapters.values():
        for part, parameter in adapter.named_parameters():
            gradient = expected.get((place.scope, place.diffusers.removeprefix("text_model."), part))
            if parameter.grad is None:  # the last layer of CLIP-L, which is not read
                assert gradient is None
                continue
            seen += 1
            assert gradient is not None, f"{place} has a gradient here and none there"
            difference = (parameter.grad - gradient.reshape(parameter.shape)).abs().max()
            assert float(difference) < 1e-4 * max(float(gradient.abs().max()), 1e-6), f"{place} {part}"
    assert seen > 300
    assert all(p.grad is None for name, p in model.named_parameters() if "adapter" not in name)
