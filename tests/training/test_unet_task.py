"""A training step of the U-Net: what it is conditioned on, what falls out, what the loss is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_cli.data.loader import Batch, Latents
from sdxl_cli.diffusion.schedule import sigma_table
from sdxl_cli.errors import UsageError
from sdxl_cli.model.conditioning import Conditioning, TextFeatures
from sdxl_cli.model.embedding import sinusoidal
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.unet import initialize
from sdxl_cli.training.config import OptimizerConfig, UNetTrainConfig
from sdxl_cli.training.draws import streams
from sdxl_cli.training.loop import Run
from sdxl_cli.training.unet_task import UNetTask, micro_conditions
from tests.training.small import SMALL, SMALL_REFINER, unet_config

LATENT = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Repeating:
    """The same batch at every step; its posterior has no width, so that latents are known."""

    def batch(self, step: int) -> Batch:
        return Batch(
            images=None,
            latents=Latents(LATENT / SMALL.vae.scale_factor, torch.full_like(LATENT, -30.0)),
            captions=["one", "two", "three"],
            original_size=[(10, 20), (30, 40), (50, 60)],
            crop_top_left=[(1, 2), (3, 4), (5, 6)],
            target_size=[(64, 64)] * 3,
            aesthetic_score=[6.0, 5.0, 4.0],
            ids=["a", "b", "c"],
            weight=torch.ones(3),
        )


@dataclass
class Seen:
    network_input: Tensor
    levels: Tensor
    crossattn: Tensor
    vector: Tensor


class Recorder(torch.nn.Module):
    """In the U-Net's place: remembers what it is given and says the same thing always."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.answer = torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(9))

    def forward(self, x: Tensor, levels: Tensor, context: Tensor, y: Tensor) -> Tensor:
        self.seen.append(Seen(x, levels, context, y))
        return self.answer


def words(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids that differ by caption; no tokenizer needed."""
    ids = torch.tensor([[49406, 10 + len(text), 49407, *[0] * 74] for text in captions])
    return ids, ids


def make_task(config: UNetTrainConfig, model_config: Any = SMALL) -> tuple[UNetTask, Recorder]:
    torch.manual_seed(0)
    model = SDXL(model_config, ("unet", "text"))
    recorder = Recorder()
    model.model.diffusion_model = recorder
    return UNetTask(model, Repeating(), words, config), recorder


def run(task: UNetTask, seed: int = 0) -> tuple[float, dict[str, float]]:
    loss, metrics = task.step(0, torch.Generator().manual_seed(seed))
    return loss.item(), metrics


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_follows_from_what_the_network_was_given(prediction: Any, gamma: float) -> None:
    """The noise is worked out from the network's input: x = (latent + sigma noise) / sqrt(sigma² + 1)."""
    config = unet_config(prediction=prediction, min_snr_gamma=gamma, text_dropout=0.0)
    task, recorder = make_task(config)
    loss, metrics = run(task)
    seen = recorder.seen[0]
    sigma = sigma_table()[seen.levels].double().view(-1, 1, 1, 1)
    noise = (seen.network_input.double() * (sigma**2 + 1).sqrt() - LATENT.double()) / sigma
    target = noise if prediction == "eps" else (noise - sigma * LATENT) / (sigma**2 + 1).sqrt()
    errors = (recorder.answer.double() - target).square().mean((1, 2, 3))
    snr = sigma.flatten() ** -2
    weights = torch.ones_like(snr)
    if gamma:
        weights = snr.clamp(max=gamma) / (snr if prediction == "eps" else snr + 1)
    assert loss == pytest.approx(float((weights * errors).mean()), rel=1e-3)
    assert metrics["images"] == 3.0
    assert metrics["mse"] == pytest.approx(float(errors.mean()), rel=1e-3)


def test_with_zero_terminal_snr_the_last_level_is_pure_noise() -> None:
    config = unet_config(prediction="v", zero_terminal_snr=True, timestep_min=999, min_snr_gamma=0.0)
    task, recorder = make_task(config)
    loss, _ = run(task)
    seen = recorder.seen[0].network_input
    assert float((seen * LATENT).mean() / LATENT.square().mean()) < 0.2
    # there v is the latent with the sign turned
    error = (recorder.answer + LATENT).square().mean()
    assert loss == pytest.approx(float(error), rel=3e-3)
    with pytest.raises(UsageError, match="zero_terminal_snr needs prediction"):
        unet_config(zero_terminal_snr=True)


def test_levels_stay_within_what_was_asked_and_reach_both_ends() -> None:
    task, recorder = make_task(unet_config(timestep_min=3, timestep_max=9))
    for seed in range(60):
        run(task, seed)
    assert {int(level) for seen in recorder.seen for level in seen.levels} == set(range(3, 10))


def test_the_vector_is_pooled_text_and_the_sizes_of_each_picture() -> None:
    task, recorder = make_task(unet_config(text_dropout=0.0))
    run(task)
    pooled = task.module.conditioner.text(*words(["one", "two", "three"])).pooled
    numbers = [[10, 20, 1, 2, 64, 64], [30, 40, 3, 4, 64, 64], [50, 60, 5, 6, 64, 64]]
    for sample, row in enumerate(numbers):
        expected = torch.cat([sinusoidal(torch.tensor([float(n)]), 32)[0] for n in row])
        torch.testing.assert_close(recorder.seen[0].vector[sample, 24:], expected)
    torch.testing.assert_close(recorder.seen[0].vector[:, :24], pooled)


def test_a_refiner_is_told_the_aesthetic_score() -> None:
    task, recorder = make_task(unet_config(text_dropout=0.0, model="small-refiner"), SMALL_REFINER)
    run(task)
    vector = recorder.seen[0].vector
    assert vector.shape == (3, 24 + 5 * 32)
    scores = [sinusoidal(torch.tensor([score]), 32)[0] for score in (6.0, 5.0, 4.0)]
    torch.testing.assert_close(vector[:, -32:], torch.stack(scores))
    assert [m.aesthetic_score for m in micro_conditions(Repeating().batch(0))] == [6.0, 5.0, 4.0]


def dropped(task: UNetTask, seeds: int) -> Tensor:
    """Which of CLIP-L, bigG and pooled fell out, for each sample [seeds * 200, 3]."""
    text = TextFeatures(torch.ones(200, 77, 40), torch.ones(200, 24))
    rows = []
    for seed in range(seeds):
        out = task._dropped(text, streams(torch.Generator().manual_seed(seed), range(len(text.pooled))))
        parts = (out.crossattn[..., :16], out.crossattn[..., 16:], out.pooled)
        flat = [part.flatten(1) for part in parts]
        assert all(bool((part == part[:, :1]).all()) for part in flat), "all of it or nothing"
        rows.append(torch.stack([part[:, 0] == 0 for part in flat], dim=1))
    return torch.cat(rows)


def test_features_fall_out_independently() -> None:
    """facts: a Bernoulli draw per sample and per output."""
    task, _ = make_task(unet_config(text_dropout=0.3))
    out = dropped(task, 10).float()
    assert out.mean(0).tolist() == pytest.approx([0.3] * 3, abs=0.04)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert float((out[:, first] * out[:, second]).mean()) == pytest.approx(0.09, abs=0.03)


def test_features_fall_out_jointly_when_asked() -> None:
    task, _ = make_task(unet_config(text_dropout=0.3, text_dropout_mode="joint"))
    out = dropped(task, 10)
    assert float(out[:, 0].float().mean()) == pytest.approx(0.3, abs=0.04)
    assert bool((out == out[:, :1]).all())


def test_each_embedder_has_a_chance_of_its_own() -> None:
    task, _ = make_task(unet_config(text_dropout=0.1, dropout={"big_g": 0.6, "pooled": 0.0}))
    assert dropped(task, 10).float().mean(0).tolist() == pytest.approx([0.1, 0.6, 0.0], abs=0.04)


def test_sizes_fall_out_as_whole_embedders() -> None:
    """As the original's ConcatTimestepEmbedderND with a ucg_rate: all features of the pair are zeros."""
    task, recorder = make_task(unet_config(text_dropout=0.0, dropout={"crop_top_left": 0.5}))
    for seed in range(60):
        run(task, seed)
    pairs = torch.cat([seen.vector[:, 24:] for seen in recorder.seen]).view(-1, 3, 64)
    gone = (pairs == 0).all(dim=2)
    assert not gone[:, [0, 2]].any()
    assert float(gone[:, 1].float().mean()) == pytest.approx(0.5, abs=0.12)
    assert torch.equal(gone, pairs[:, :, 0] == 0), "all of a pair or nothing"


def test_captions_become_the_empty_text_when_asked() -> None:
    task, recorder = make_task(unet_config(text_dropout=0.5, text_dropout_mode="empty"))
    full = task.module.conditioner.text(*words(["one", "two", "three"]))
    empty = task.module.conditioner.text(*words([""]))
    counts = [0, 0]
    for seed in range(40):
        run(task, seed)
        seen = recorder.seen[-1]
        for sample in range(3):
            given = Conditioning(seen.crossattn[sample], seen.vector[sample, :24])
            is_empty = torch.allclose(given.crossattn, empty.crossattn[0], atol=1e-5)
            expected = empty if is_empty else full
            row = 0 if is_empty else sample
            torch.testing.assert_close(given.crossattn, expected.crossattn[row])
            torch.testing.assert_close(given.vector, expected.pooled[row])
            counts[is_empty] += 1
    assert min(counts) > 40


@pytest.mark.parametrize("trains_text", [True, False])
def test_text_encoders_learn_only_when_asked(trains_text: bool) -> None:
    torch.manual_seed(0)
    model = SDXL(SMALL, ("unet", "text"))
    task = UNetTask(model, Repeating(), words, unet_config(train_text_encoders=trains_text, text_dropout=0.0))
    task.step(0, torch.Generator().manual_seed(0))[0].backward()  # type: ignore[no-untyped-call]
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith("model.diffusion_model") for name in learning)
    assert any(name.startswith("conditioner") for name in learning) == trains_text


def test_a_short_batch_is_trained_on_as_it_is() -> None:
    task, recorder = make_task(replace(unet_config(), text_dropout=0.0))
    whole = Repeating().batch(0)
    assert whole.latents

    class Short:
        def batch(self, step: int) -> Batch:
            assert whole.latents
            latents = Latents(whole.latents.mean[:1], whole.latents.logvar[:1])
            lists = {
                n: getattr(whole, n)[:1] for n in Batch.__slots__ if n not in ("images", "latents", "text")
            }
            return Batch(images=None, latents=latents, **lists)

    recorder.answer = recorder.answer[:1]
    task.batches = Short()
    _, metrics = run(task)
    assert metrics["images"] == 1.0
    assert recorder.seen[0].network_input.shape == (1, 4, 8, 8)


@pytest.mark.slow
def test_a_small_network_learns_a_batch_by_heart(tmp_path: Path) -> None:
    """It begins at zero, so at the variance of the noise; knowing the latents, it can tell the noise."""
    torch.manual_seed(0)
    model = SDXL(SMALL, ("unet", "text"))
    initialize(model.unet, SMALL.big_g.embed_dim)
    model.conditioner.requires_grad_(False)
    config = unet_config(
        train_text_encoders=False,
        text_dropout=0.0,
        min_snr_gamma=0.0,
        noise_offset=0.0,
        timestep_min=300,
        max_steps=60,
        log_every=20,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=10),
    )
    Run(UNetTask(model, Repeating(), words, config), config.loop, tmp_path, {}).train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(0.75, abs=0.2)
    assert losses[-1] < 0.35
