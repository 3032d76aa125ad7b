"""What is computed once per prompt, or once for both sides of guidance, changes nothing but the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdxl_cli.model.attention import Attention
from sdxl_cli.model.unet import UNet, initialize
from tests.model.peers import BASE, REFINER, randomize, relative, stepped

BOUND = 5e-6
"""What another order of summation may do."""


@pytest.fixture(scope="module", params=["base", "refiner"])
def network(request: pytest.FixtureRequest) -> UNet:
    network = UNet((BASE if request.param == "base" else REFINER).unet)
    randomize(network)
    return network.requires_grad_(False)


def conditions(network: UNet, rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    config = network.config
    return torch.randn(rows, 7, config.context_dim), torch.randn(rows, config.adm_in_channels)


@contextmanager
def seen_rows(network: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """(rows asking, rows answering) of every cross-attention."""
    seen: list[tuple[int, int]] = []

    def note(module: nn.Module, args: tuple[Tensor, object], output: Tensor) -> None:
        seen.append((len(args[0]), len(args[1].keys)))  # type: ignore[attr-defined]

    handles = [m.register_forward_hook(note) for name, m in network.named_modules() if name.endswith("attn2")]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("size", [(8, 8), (5, 12)])
def test_prepared_conditions_give_what_the_conditions_give(network: UNet, size: tuple[int, int]) -> None:
    context, vector = conditions(network, 2)
    x, t = torch.randn(2, 4, *size), torch.tensor([700, 3])
    expected = network(x, t, context, vector)
    assert relative(stepped(network, x, t, network.prepare(context, vector)), expected) < BOUND


def test_all_timesteps_at_once_give_what_each_gives(network: UNet) -> None:
    context, vector = conditions(network, 2)
    t, prepared = torch.tensor([[999, 999], [700, 3], [0, 0]]), network.prepare(context, vector)
    together = network.shifts(t, prepared)
    for row, shifts in zip(t, together, strict=True):
        assert relative(shifts, network.shifts(row[None], prepared)[0]) < BOUND
    assert relative(together[0], together[2]) > 0.01, "timesteps differ"


def test_both_sides_of_guidance_share_their_latents(network: UNet) -> None:
    context, vector = conditions(network, 4)
    x, t = torch.randn(2, 4, 6, 10), torch.full((4,), 512)
    expected = network(torch.cat([x, x]), t, context, vector)
    assert relative(stepped(network, x, t, network.prepare(context, vector)), expected) < BOUND


@pytest.mark.parametrize("bare", [1, 2, 3])
def test_a_text_of_zeros_needs_no_cross_attention(network: UNet, bare: int) -> None:
    context, vector = conditions(network, 3)
    context[:bare] = 0.0
    x, t = torch.randn(3, 4, 8, 6), torch.tensor([999, 400, 0])
    expected = network(x, t, context, vector)
    with seen_rows(network) as seen:
        made = stepped(network, x, t, network.prepare(context, vector))
    assert relative(made, expected) < BOUND
    assert set(seen) == {(3 - bare, 3 - bare)}


def test_a_text_with_a_single_number_is_read(network: UNet) -> None:
    context, vector = conditions(network, 2)
    context[0] = 0.0
    context[0, 3, 1] = 5.0
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 10])
    expected = network(x, t, context, vector)
    with seen_rows(network) as seen:
        made = stepped(network, x, t, network.prepare(context, vector))
    assert relative(made, expected) < BOUND
    assert set(seen) == {(2, 2)}


def test_the_saved_work_is_counted(network: UNet) -> None:
    """The first convolutions once instead of twice, keys and values not at all, no attention for zeros."""
    context, vector = conditions(network, 2)
    context[0] = 0.0
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([5, 5])
    prepared = network.prepare(context, vector)
    shifts = network.shifts(t[None], prepared)[0]
    with FlopCounterMode(display=False) as plain:
        network(torch.cat([x, x]), t, context, vector)
    with FlopCounterMode(display=False) as saving:
        network.step(x, shifts, prepared)
    width, pixels = network.config.model_channels, 16 * 16
    shared = 2 * pixels * 9 * (4 * width + width * width)  # conv_in and the first block's first convolution
    texts = sum(
        2 * 2 * 7 * 2 * m.to_k.in_features * m.to_k.out_features
        for name, m in network.named_modules()
        if name.endswith("attn2") and isinstance(m, Attention)
    )
    assert plain.get_total_flops() - saving.get_total_flops() > shared + texts


def test_conditions_begin_as_loud_as_what_they_are_added_to() -> None:
    network = UNet(BASE.unet)
    initialize(network, BASE.big_g.embed_dim)
    pooled = torch.randn(64, BASE.big_g.embed_dim)
    rest = torch.randn(1, BASE.unet.adm_in_channels - BASE.big_g.embed_dim).expand(64, -1)
    with torch.no_grad():
        label = network.label_emb(torch.cat([pooled, rest], dim=1))
        shifts = network.input_blocks[1][0].emb_layers(label)  # type: ignore[index]
    assert 0.3 < label.std(dim=0).mean() < 2.0, "prompts differ by about one"
    assert 0.3 < shifts.std(dim=0).mean() < 2.0
