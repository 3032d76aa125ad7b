"""Both text encoders give the features that transformers and OpenCLIP give, and a mistake would show."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from sdxl_cli.checkpoint.layouts import big_g_to_original
from sdxl_cli.model import config as sizes
from sdxl_cli.model.conditioning import Conditioner
from sdxl_cli.model.text import ClipLEmbedder, OpenClipEmbedder
from tests.model.peers import (
    BASE,
    BIG_G,
    CLIP_L,
    REFINER,
    open_clip_model,
    randomize,
    relative,
    transformers_big_g,
    transformers_clip_l,
)

BOUND = 1e-5
"""What rounding may do: measured 0 … 2e-6."""
VISIBLE = 1e-4
START, END = 118, 119


def token_ids(pad: int, lengths: tuple[int, ...] = (3, 40, 75, 0)) -> Tensor:
    """Prompts of so many words, between start and end, padded to 77."""
    torch.manual_seed(3)
    rows = []
    for length in lengths:
        words = torch.randint(1, START, (length,)).tolist()
        rows.append([START, *words, END] + [pad] * (75 - length))
    return torch.tensor(rows)


IDS_L, IDS_G = token_ids(END), token_ids(0)


@dataclass
class ClipL:
    network: ClipLEmbedder
    theirs: Any

    @torch.no_grad()
    def error(self, network: ClipLEmbedder | None = None, layer: int = -2) -> float:
        states = self.theirs(IDS_L, output_hidden_states=True).hidden_states
        return relative((network or self.network)(IDS_L), states[layer])


@dataclass
class BigG:
    network: OpenClipEmbedder

    @torch.no_grad()
    def errors(self, network: OpenClipEmbedder | None = None) -> tuple[float, float]:
        """Of the penultimate features and of the pooled ones, from OpenCLIP's own path."""
        theirs = open_clip_model(self.network)
        penultimate, pooled = (network or self.network)(IDS_G)
        # what its last block is given, seen from outside
        given: list[Tensor] = []
        theirs.transformer.resblocks[-1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
        expected = theirs.encode_text(IDS_G)
        return relative(penultimate, given[0]), relative(pooled, expected)


@pytest.fixture(scope="module")
def clip_l() -> ClipL:
    network = ClipLEmbedder(CLIP_L)
    randomize(network)
    return ClipL(network, transformers_clip_l(network))


@pytest.fixture(scope="module")
def big_g() -> BigG:
    network = OpenClipEmbedder(BIG_G)
    randomize(network)
    return BigG(network)


def test_clip_l_gives_the_penultimate_hidden_state(clip_l: ClipL) -> None:
    error = clip_l.error()
    print(f"CLIP-L: {error:.1e}")
    assert error < BOUND
    assert clip_l.error(layer=-1) > VISIBLE
    assert clip_l.error(layer=-3) > VISIBLE


@torch.no_grad()
def test_clip_l_computes_what_open_clip_computes(clip_l: ClipL) -> None:
    """A second opinion."""
    state = clip_l.network.transformer.state_dict()
    plan = big_g_to_original(state)
    renamed = {name: torch.cat([state[key] for key in source.keys]) for name, source in plan.items()}
    theirs = open_clip.CLIP(
        embed_dim=CLIP_L.embed_dim,
        vision_cfg={"layers": 1, "width": 64, "patch_size": 8, "image_size": 8},
        text_cfg={"vocab_size": 120, "width": CLIP_L.width, "heads": CLIP_L.heads, "layers": CLIP_L.layers},
        quick_gelu=True,
    ).eval()
    result = theirs.load_state_dict(renamed, strict=False)
    assert not result.unexpected_keys
    assert {key.split(".")[0] for key in result.missing_keys} == {"visual", "text_projection", "logit_scale"}
    states = theirs.forward_intermediates(text=IDS_L, text_indices=2)["text_intermediates"]
    error = relative(clip_l.network(IDS_L), states[0])
    print(f"CLIP-L and OpenCLIP: {error:.1e}")
    assert error < BOUND


@torch.no_grad()
def test_clip_l_features_have_no_final_norm(clip_l: ClipL) -> None:
    norm = getattr(clip_l.theirs, "text_model", clip_l.theirs).final_layer_norm
    states = clip_l.theirs(IDS_L, output_hidden_states=True).hidden_states
    assert relative(clip_l.network(IDS_L), norm(states[-2])) > VISIBLE


def test_big_g_computes_what_open_clip_computes(big_g: BigG) -> None:
    penultimate, pooled = big_g.errors()
    print(f"bigG and OpenCLIP: penultimate {penultimate:.1e}, pooled {pooled:.1e}")
    assert max(penultimate, pooled) < BOUND


@torch.no_grad()
def test_big_g_computes_what_transformers_computes(big_g: BigG) -> None:
    out = transformers_big_g(big_g.network)(IDS_G, output_hidden_states=True)
    penultimate, pooled = big_g.network(IDS_G)
    errors = relative(penultimate, out.hidden_states[-2]), relative(pooled, out.text_embeds)
    print(f"bigG and transformers: penultimate {errors[0]:.1e}, pooled {errors[1]:.1e}")
    assert max(errors) < BOUND
    normed = big_g.network.model.ln_final(penultimate)
    assert relative(normed, out.hidden_states[-2]) > VISIBLE


@torch.no_grad()
def test_nothing_but_rounding_is_between_us(clip_l: ClipL, big_g: BigG) -> None:
    l_network, g_network = copy.deepcopy(clip_l.network).double(), copy.deepcopy(big_g.network).double()
    assert ClipL(l_network, transformers_clip_l(l_network)).error() < 1e-12
    out = transformers_big_g(g_network)(IDS_G, output_hidden_states=True)
    penultimate, pooled = g_network(IDS_G)
    errors = relative(penultimate, out.hidden_states[-2]), relative(pooled, out.text_embeds)
    print("bigG in double precision:", errors)
    assert max(errors) < 1e-12


@torch.no_grad()
def test_pooled_is_of_the_end_of_text_wherever_it_is(big_g: BigG) -> None:
    """What follows the end changes nothing, what precedes it does."""
    _, pooled = big_g.network(IDS_G)
    after, before = IDS_G.clone(), IDS_G.clone()
    after[0, 10:] = 7
    before[0, 2] = 7
    assert relative(big_g.network(after)[1][0], pooled[0]) < BOUND
    assert relative(big_g.network(before)[1][0], pooled[0]) > VISIBLE


@torch.no_grad()
def test_padding_is_read_like_any_token(clip_l: ClipL, big_g: BigG) -> None:
    """No padding mask: the released models were trained so, and each with its own padding."""
    assert relative(clip_l.network(IDS_G), clip_l.network(IDS_L)) > VISIBLE
    assert relative(big_g.network(IDS_L)[0], big_g.network(IDS_G)[0]) > VISIBLE


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip_l", "big_g"])
def test_features_of_a_text_do_not_depend_on_its_batch(tower: str, request: pytest.FixtureRequest) -> None:
    network = request.getfixturevalue(tower).network
    ids = IDS_L if tower == "clip_l" else IDS_G
    together = network(ids)
    alone = network(ids[1:2])
    pairs = [(together, alone)] if isinstance(together, Tensor) else zip(together, alone, strict=True)
    assert all(relative(many[1:2], one) < BOUND for many, one in pairs)


@pytest.mark.parametrize("tower", ["clip_l", "big_g"])
def test_every_layer_norm_has_the_right_epsilon(tower: str, request: pytest.FixtureRequest) -> None:
    """1e-5. Each is exchanged alone."""
    case: Any = request.getfixturevalue(tower)
    network = copy.deepcopy(case.network)
    seen = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
            module.eps = 1e-6
            seen[path] = case.error(network) if tower == "clip_l" else max(case.errors(network))
            module.eps = 1e-5
    unused = ("layers.3.", "final_layer_norm") if tower == "clip_l" else ()
    used = {path: error for path, error in seen.items() if not any(part in path for part in unused)}
    print(f"{tower}: {len(used)} norms, the least visible {min(used.values()):.1e}")
    assert min(used.values()) > VISIBLE


def test_the_activations_are_not_exchanged(clip_l: ClipL, big_g: BigG) -> None:
    """CLIP-L has the sigmoid approximation, bigG the exact function and not that by tanh."""
    wrong = ClipLEmbedder(replace(CLIP_L, activation="gelu"))
    wrong.load_state_dict(clip_l.network.state_dict())
    seen = {"gelu in CLIP-L": clip_l.error(wrong.eval())}
    for name, activation in (
        ("quick_gelu in bigG", open_clip.transformer.QuickGELU()),
        ("gelu by tanh in bigG", nn.GELU(approximate="tanh")),
    ):
        network = copy.deepcopy(big_g.network)
        for block in network.model.transformer.resblocks:
            assert isinstance(block.mlp.gelu, nn.GELU)
            block.mlp.gelu = activation
        seen[name] = min(big_g.errors(network))
    print({name: f"{error:.1e}" for name, error in seen.items()})
    assert min(seen.values()) > VISIBLE


def test_the_released_towers_have_the_sizes_open_clip_gives_them() -> None:
    for ours, name in ((sizes.CLIP_L, "ViT-L-14-quickgelu"), (sizes.BIG_G, "ViT-bigG-14")):
        theirs = open_clip.get_model_config(name)
        text = theirs["text_cfg"]
        assert (ours.width, ours.heads, ours.layers) == (text["width"], text["heads"], text["layers"])
        assert (ours.vocab_size, ours.context_length) == (text["vocab_size"], text["context_length"])
        assert ours.embed_dim == theirs["embed_dim"]
        assert (ours.activation == "quick_gelu") == theirs.get("quick_gelu", False)


@torch.no_grad()
def test_features_are_joined_clip_l_first(clip_l: ClipL, big_g: BigG) -> None:
    """[B, 77, 48 | 64] and [B, 40]; the order of the embedders in the released file."""
    conditioner = Conditioner(BASE)
    conditioner.embedders[0].load_state_dict(clip_l.network.state_dict())
    conditioner.embedders[1].load_state_dict(big_g.network.state_dict())
    features = conditioner.eval().text(IDS_L, IDS_G)
    states = clip_l.theirs(IDS_L, output_hidden_states=True).hidden_states[-2]
    out = transformers_big_g(big_g.network)(IDS_G, output_hidden_states=True)
    assert relative(features.crossattn, torch.cat([states, out.hidden_states[-2]], dim=-1)) < BOUND
    assert relative(features.pooled, out.text_embeds) < BOUND
    empty = features.zeros()
    assert (empty.crossattn.shape, empty.pooled.shape) == ((4, 77, 112), (4, 40))
    assert not empty.crossattn.any()
    assert not empty.pooled.any()


@torch.no_grad()
def test_a_refiner_reads_big_g_alone(big_g: BigG) -> None:
    conditioner = Conditioner(REFINER)
    assert len(conditioner.embedders) == 1
    conditioner.embedders[0].load_state_dict(big_g.network.state_dict())
    features = conditioner.eval().text(None, IDS_G)
    penultimate, pooled = big_g.network(IDS_G)
    assert torch.equal(features.crossattn, penultimate)
    assert torch.equal(features.pooled, pooled)
