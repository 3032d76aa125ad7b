"""Token tables with the captions' words only train as the full ones would."""

from __future__ import annotations

import torch
from torch import Tensor

from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.config import OptimizerConfig
from sdxl_cli.training.optimizers import build_optimizer
from sdxl_cli.training.vocabulary import compact, expand
from tests.training.small import SMALL

IDS = torch.tensor([0, 320, 736, 1237, 49406, 49407])
SENTENCES = torch.tensor(
    [[49406, 320, 736, 49407, *[0] * 73], [49406, 1237, 49407, *[0] * 74], [49406, 736, 49407, *[0] * 74]]
)
TABLES = (
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    "conditioner.embedders.1.model.token_embedding.weight",
)


def text_model() -> SDXL:
    torch.manual_seed(0)
    return SDXL(SMALL, ("text",))


def features(model: SDXL, ids: Tensor) -> Tensor:
    text = model.conditioner.text(ids, ids)
    return torch.cat([text.crossattn.flatten(1), text.pooled], dim=1)


def test_a_compact_model_reads_known_words_as_the_full_one_does() -> None:
    full, small = text_model(), text_model()
    compact(small, IDS)
    assert torch.equal(features(small, SENTENCES), features(full, SENTENCES))
    assert small.known_token_ids == frozenset(IDS.tolist())
    assert {small.get_parameter(name).shape[0] for name in TABLES} == {len(IDS) + 1}


def test_all_other_words_share_one_row() -> None:
    model = text_model()
    compact(model, IDS)
    one, other = SENTENCES[:1].clone(), SENTENCES[:1].clone()
    one[0, 1], other[0, 1] = 5000, 40000
    assert torch.equal(features(model, one), features(model, other))


def test_training_the_compact_table_and_expanding_it_is_training_the_full_one() -> None:
    full, small = text_model(), text_model()
    compact(small, IDS)
    for model in (full, small):
        optimizer = build_optimizer(
            dict(model.named_parameters()), OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
        )
        for step in range(4):
            optimizer.zero_grad()
            loss = features(model, SENTENCES[step % 2 :]).sin().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    expanded = expand(dict(small.state_dict()), IDS, 49408)
    assert expanded.keys() == full.state_dict().keys()
    for name, value in full.state_dict().items():
        if name in TABLES:
            torch.testing.assert_close(expanded[name][IDS], value[IDS], rtol=1e-5, atol=1e-6)
            others = torch.ones(49408, dtype=torch.bool)
            others[IDS] = False
            assert bool((expanded[name][others] == expanded[name][1]).all())
        else:
            torch.testing.assert_close(expanded[name], value, rtol=1e-4, atol=1e-5)


def test_an_expanded_model_can_be_cut_down_again_without_loss() -> None:
    model = text_model()
    compact(model, IDS)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    again = text_model()
    again.load_state_dict(expand(dict(model.state_dict()), IDS, 49408))
    compact(again, IDS)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_words_that_a_model_learns_later_each_start_anew() -> None:
    model, more = text_model(), torch.tensor([0, 320, 736, 1237, 2368, 4287, 49406, 49407])
    compact(model, IDS)
    state = expand(dict(model.state_dict()), IDS, 49408)
    again = text_model()
    again.load_state_dict(state)
    again.known_token_ids = model.known_token_ids
    compact(again, more)
    assert again.known_token_ids == frozenset(more.tolist())
    for name in TABLES:
        table = again.get_parameter(name)
        assert torch.equal(table[:4], model.get_parameter(name)[:4])
        assert not torch.allclose(table[4], table[5]), "they shared one row before"
