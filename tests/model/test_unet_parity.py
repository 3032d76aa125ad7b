"""The U-Net computes what diffusers' computes from the same weights, and the comparison would show a mistake."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sdxl_kernels import convolution
from torch import Tensor, nn

from sdxl_cli.model import attention as attention_layer
from sdxl_cli.model import unet as ours
from sdxl_cli.model.conditioning import MicroConditioning, conditioning_vector
from sdxl_cli.model.config import ModelConfig
from tests.model.peers import BASE, REFINER, diffusers_unet, randomize, relative

BOUND = 2e-5
"""What rounding may do: measured 2e-6 … 7e-6."""
VISIBLE = 1e-4
"""What the least mistake has to do."""

MICRO = [
    MicroConditioning(original_size=(640, 320), crop_top_left=(0, 48), target_size=(512, 768)),
    MicroConditioning(
        original_size=(1024, 512), crop_top_left=(7, 0), target_size=(900, 1100), aesthetic_score=2.5
    ),
    MicroConditioning(original_size=(333, 2048), target_size=(1024, 1024), aesthetic_score=9.25),
]


@dataclass
class Case:
    """A network of ours, inputs, and what diffusers makes of them."""

    config: ModelConfig
    network: ours.UNet
    x: Tensor
    t: Tensor
    context: Tensor
    pooled: Tensor
    expected: Tensor

    def error(self, network: nn.Module | None = None) -> float:
        micro = MICRO[: len(self.x)]
        vector = conditioning_vector(self.config, self.pooled, micro)
        with torch.no_grad():
            return relative((network or self.network)(self.x, self.t, self.context, vector), self.expected)


def time_ids(config: ModelConfig, batch: int) -> Tensor:
    """As diffusers' pipelines write them."""
    last = (lambda m: [m.aesthetic_score]) if config.is_refiner else (lambda m: list(m.target_size))
    return torch.tensor([[*m.original_size, *m.crop_top_left, *last(m)] for m in MICRO[:batch]])


@torch.no_grad()
def make_case(
    config: ModelConfig, batch: int, size: tuple[int, int], tokens: int, dtype: torch.dtype = torch.float32
) -> Case:
    network = ours.UNet(config.unet)
    randomize(network).to(dtype)
    torch.manual_seed(1)
    case = Case(
        config=config,
        network=network,
        x=torch.randn(batch, 4, *size, dtype=dtype),
        t=torch.tensor([999, 437, 0])[:batch],
        context=torch.randn(batch, tokens, config.unet.context_dim, dtype=dtype),
        pooled=torch.randn(batch, config.big_g.embed_dim, dtype=dtype),
        expected=torch.empty(0),
    )
    added = {"text_embeds": case.pooled, "time_ids": time_ids(config, batch)}
    theirs: Any = diffusers_unet(network, config)
    case.expected = theirs(case.x, case.t, case.context, added_cond_kwargs=added).sample
    return case


@pytest.fixture(scope="module")
def base() -> Case:
    return make_case(BASE, batch=2, size=(4, 6), tokens=5)


@pytest.fixture(scope="module")
def refiner() -> Case:
    return make_case(REFINER, batch=2, size=(8, 4), tokens=5)


@pytest.fixture(params=["base", "refiner"])
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.getfixturevalue(request.param)
    return chosen


@pytest.mark.parametrize("config", [BASE, REFINER], ids=["base", "refiner"])
@pytest.mark.parametrize(("batch", "size", "tokens"), [(3, (16, 8), 77), (1, (11, 14), 154), (2, (5, 7), 1)])
def test_same_weights_same_output(
    config: ModelConfig, batch: int, size: tuple[int, int], tokens: int
) -> None:
    error = make_case(config, batch, size, tokens).error()
    print(f"U-Net {size}: {error:.1e}")
    assert error < BOUND


@torch.no_grad()
@pytest.mark.parametrize("config", [BASE, REFINER], ids=["base", "refiner"])
def test_nothing_but_rounding_is_between_us(config: ModelConfig) -> None:
    """In double precision (but for the sinusoid, which both round to single) the two agree to 15 digits."""
    error = make_case(config, 2, (6, 9), 11, torch.float64).error()
    print(f"U-Net in double precision: {error:.1e}")
    assert error < 1e-12


def swap_epsilons(norms: Iterable[nn.GroupNorm | nn.LayerNorm]) -> None:
    for norm in norms:
        norm.eps = 1e-6 if norm.eps == 1e-5 else 1e-5


def test_every_normalization_has_the_right_epsilon() -> None:
    """Group norms 1e-5 in residual blocks and at the end, 1e-6 before transformers; layer norms 1e-5.

    Each is exchanged alone: none hides behind another.
    """
    case = make_case(replace(BASE, unet=replace(BASE.unet, num_res_blocks=1)), 1, (4, 6), 5)
    network = copy.deepcopy(case.network)
    seen = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            swap_epsilons([module])
            seen[path] = case.error(network)
            swap_epsilons([module])
    print(f"{len(seen)} norms, the least visible {min(seen.values()):.1e}")
    assert case.error(network) < BOUND
    hidden = [path for path, error in seen.items() if error < VISIBLE]
    assert not hidden


KINDS = {
    "residual blocks and output": lambda m: isinstance(m, nn.GroupNorm) and m.eps == 1e-5,
    "before transformers": lambda m: isinstance(m, nn.GroupNorm) and m.eps == 1e-6,
    "inside transformers": lambda m: isinstance(m, nn.LayerNorm),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_epsilon_is_seen(case: Case, kind: str) -> None:
    network = copy.deepcopy(case.network)
    norms = [module for module in network.modules() if KINDS[kind](module)]
    swap_epsilons(norms)
    error = case.error(network)
    print(f"{kind}, {len(norms)} norms: {error:.1e}")
    assert error > VISIBLE


def tanh_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="tanh")


def swapped_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gate, value = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def sinusoid(order: str, half_minus: int, dtype: torch.dtype) -> Callable[[Tensor, int], Tensor]:
    def features(values: Tensor, dim: int) -> Tensor:
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float64) / (half - half_minus)
        angles = (values[:, None] * torch.exp(-math.log(10_000) * exponents).to(dtype)).float()
        parts = [angles.cos(), angles.sin()]
        return torch.cat(parts if order == "cos sin" else parts[::-1], dim=-1)

    return features


def test_the_right_sinusoid_passes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out again with frequencies in double precision: the mistakes below are what they say."""
    monkeypatch.setattr(ours, "sinusoidal", sinusoid("cos sin", 0, torch.float64))
    assert case.error() < VISIBLE


MISTAKES: dict[str, tuple[str, Any]] = {
    "gelu by tanh": ("geglu", tanh_geglu),
    "gate before value": ("geglu", swapped_geglu),
    "sin before cos": ("sinusoidal", sinusoid("sin cos", 0, torch.float64)),
    "frequencies down to 1/10000": ("sinusoidal", sinusoid("cos sin", 1, torch.float64)),
    "frequencies in half precision": ("sinusoidal", sinusoid("cos sin", 0, torch.float16)),
    "downsampling padded as in the VAE": (
        "downsample_conv",
        lambda x, w, b: convolution.downsample_conv_asymmetric(F.pad(x, (0, 1, 0, 1)), w, b)[
            ..., : -(-x.shape[2] // 2), : -(-x.shape[3] // 2)
        ],
    ),
    "scores not divided by the root of the head width": (
        "attention",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
    ),
    "causal attention": (
        "attention",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ),
    "no activation after the norms": (
        "group_norm_silu",
        lambda x, groups, w, b, eps: F.group_norm(x, groups, w, b, eps),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(case: Case, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(attention_layer if name == "attention" else ours, name, wrong)
    error = case.error()
    print(f"{mistake}: {error:.1e}")
    assert error > VISIBLE


def test_sizes_are_told_as_height_and_width(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """(width, height), or (left, top), is another picture."""
    honest = MicroConditioning.numbers
    monkeypatch.setattr(
        MicroConditioning,
        "numbers",
        lambda self, scalars: [n for s in scalars for n in honest(self, [s])[::-1]],
    )
    assert case.error() > VISIBLE


def test_skips_are_joined_after_what_comes_from_below(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same widths on both sides where a level has its own width: [skip, x] would load too."""
    joined = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, dim=0: joined(tensors[::-1], dim=dim))
    assert case.error() > VISIBLE


def test_a_new_network_begins_by_predicting_zero() -> None:
    """As the original does: every residual branch, and the output, starts at zero."""
    network = ours.UNet(BASE.unet)
    ours.initialize(network, BASE.big_g.embed_dim)
    x = torch.randn(1, 4, 8, 8)
    context, vector = torch.randn(1, 3, BASE.unet.context_dim), torch.randn(1, BASE.unet.adm_in_channels)
    with torch.no_grad():
        assert not network(x, torch.tensor([500]), context, vector).any()
        for module in network.modules():
            if isinstance(module, ours.SpatialTransformer):
                hidden = torch.randn(1, module.proj_in.in_features, 2, 3)
                assert torch.equal(module(hidden, context), hidden)
