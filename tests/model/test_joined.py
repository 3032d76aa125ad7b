"""Queries, keys and values by one product: the same numbers, from parameters that are still there."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sdxl_cli.generation.streaming import stream
from sdxl_cli.model.attention import Attention
from sdxl_cli.model.unet import TransformerBlock, UNet
from tests.model.peers import BASE, randomize, relative
from tests.model.peers import stepped as stepped_at


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def unet() -> UNet:
    unet = UNet(BASE.unet).eval().requires_grad_(False)
    randomize(unet)
    return unet


def stepped(unet: UNet) -> Tensor:
    torch.manual_seed(0)
    text, vector = torch.randn(2, 7, unet.config.context_dim), torch.randn(2, unet.config.adm_in_channels)
    return stepped_at(unet, torch.randn(1, 4, 16, 12), torch.tensor([500, 500]), unet.prepare(text, vector))


def layers(unet: UNet) -> list[Attention]:
    return [module.attn1 for module in unet.modules() if isinstance(module, TransformerBlock)]


def test_the_result_is_the_same(unet: UNet) -> None:
    expected = stepped(unet)
    unet.join_projections()
    assert all(layer._is_joined() for layer in layers(unet))
    assert relative(stepped(unet), expected) < 1e-6


def test_one_product_is_computed(unet: UNet) -> None:
    unet.join_projections()
    for layer in layers(unet):
        for linear in (layer.to_q, layer.to_k, layer.to_v):
            linear.register_forward_hook(lambda *_: pytest.fail("a product of its own"))
    stepped(unet)


def test_parameters_keep_names_shapes_and_values(unet: UNet) -> None:
    before = copy.deepcopy(unet.state_dict())
    unet.join_projections()
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].is_contiguous() for name in before)
    assert [name for name, _ in unet.named_parameters()] == list(before)


def test_weights_are_there_once(unet: UNet) -> None:
    """The three are parts of one storage, and nobody keeps what held them before."""
    before = sum(parameter.nbytes for parameter in unet.parameters())
    first = layers(unet)[0]
    old = [StorageWeakRef(linear.weight.untyped_storage()) for linear in (first.to_q, first.to_k, first.to_v)]
    unet.join_projections()
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in unet.parameters()}
    assert sum(held.values()) == before
    assert all(reference.expired() for reference in old)
    for layer in layers(unet):
        assert layer.joined is not None
        assert layer.joined.untyped_storage().data_ptr() in held


def test_what_changes_in_place_is_seen(unet: UNet) -> None:
    """As when a LoRA is merged into a model that is loaded."""
    fresh = copy.deepcopy(unet)
    unet.join_projections()
    plain = stepped(unet)
    for network in (unet, fresh):
        torch.manual_seed(1)
        for layer in layers(network):
            for linear in (layer.to_q, layer.to_k, layer.to_v):
                linear.weight.add_(torch.randn(linear.weight.shape), alpha=0.1)
    assert all(layer._is_joined() for layer in layers(unet))
    assert relative(stepped(unet), stepped(fresh)) < 1e-6
    assert relative(stepped(unet), plain) > 1e-3


def test_a_weight_that_was_replaced_is_used(unet: UNet) -> None:
    fresh = copy.deepcopy(unet)
    unet.join_projections()
    plain = stepped(unet)
    for network in (unet, fresh):
        for layer in layers(network):
            layer.to_k.weight.data = 0.5 * layer.to_k.weight.data
    assert relative(stepped(unet), stepped(fresh)) < 1e-6
    assert relative(stepped(unet), plain) > 1e-3
    assert all(layer.joined is None for layer in layers(unet)), "memory is given back"


def test_another_precision_is_computed_in(unet: UNet) -> None:
    unet.join_projections()
    expected = stepped(unet)
    unet.double()
    torch.manual_seed(0)
    x = torch.randn(1, 3, unet.config.model_channels * 2, dtype=torch.float64)
    assert layers(unet)[0].of_itself(x).dtype == torch.float64
    unet.float()
    assert relative(stepped(unet), expected) < 1e-6


def test_while_training_they_are_apart(unet: UNet) -> None:
    with torch.inference_mode(False):
        trained = UNet(BASE.unet)
        trained.join_projections()
        text, vector = torch.randn(1, 7, BASE.unet.context_dim), torch.randn(1, BASE.unet.adm_in_channels)
        trained(torch.randn(1, 4, 8, 8), torch.tensor([3]), text, vector).sum().backward()
    for layer in layers(trained):
        assert all(linear.weight.grad is not None for linear in (layer.to_q, layer.to_k, layer.to_v))


def test_a_block_that_comes_and_goes_has_them_joined_while_it_is_there(unet: UNet) -> None:
    expected = stepped(unet)
    stream(unet, torch.device("cpu"), torch.float32, joined=True)
    joined: list[bool] = []
    for layer in layers(unet):
        layer.to_out.register_forward_hook(lambda *_, layer=layer: joined.append(layer._is_joined()))
    places = [parameter.data_ptr() for parameter in unet.parameters()]
    assert relative(stepped(unet), expected) < 1e-6
    assert joined
    assert all(joined)
    assert all(layer.joined is None for layer in layers(unet))
    assert [parameter.data_ptr() for parameter in unet.parameters()] == places
