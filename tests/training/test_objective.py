"""The whole objective beside diffusers: its U-Net, scheduler and training script's formulas, the same numbers in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from sdxl_cli.checkpoint.layouts import unet_to_diffusers
from sdxl_cli.data.loader import Batch, Latents
from sdxl_cli.model.conditioning import TextFeatures
from sdxl_cli.model.config import ModelConfig
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.config import LoopConfig, UNetTrainConfig
from sdxl_cli.training.draws import streams
from sdxl_cli.training.unet_task import UNetTask
from tests.model.peers import BASE, REFINER, diffusers_unet, randomize, taken

LIMIT = 1e-4
SEED = 25
"""Draws levels 58, 846 and 243: one of little noise, where min-SNR weighs less, and two of much."""
COUNT, SIZE = 3, (6, 10)
SIZES = [(640, 320), (1024, 512), (333, 2048)]
CROPS = [(0, 48), (7, 0), (0, 0)]
TARGETS = [(512, 768), (900, 1100), (1024, 1024)]
SCORES = [6.0, 2.5, 9.25]


class Given:
    """One batch whose latents and features of captions are given."""

    def __init__(self, model: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(3)
        self.latent = torch.randn(COUNT, 4, *SIZE, generator=generator)
        self.text = TextFeatures(
            torch.randn(COUNT, 7, model.unet.context_dim, generator=generator),
            torch.randn(COUNT, model.big_g.embed_dim, generator=generator),
        )
        self.scale = model.vae.scale_factor

    def batch(self, step: int) -> Batch:
        return Batch(
            images=None,
            latents=Latents(self.latent / self.scale, torch.full_like(self.latent, -60.0)),
            captions=[""] * COUNT,
            original_size=SIZES,
            crop_top_left=CROPS,
            target_size=TARGETS,
            aesthetic_score=SCORES,
            ids=["a", "b", "c"],
            weight=torch.ones(COUNT),
            text=self.text,
        )


def ours(model: ModelConfig, config: UNetTrainConfig, given: Given) -> tuple[SDXL, Tensor]:
    network = SDXL(model, ("unet", "text"))
    randomize(network.unet, stream=1.0)
    network.requires_grad_(False).unet.requires_grad_(True)
    empty = TextFeatures(torch.zeros(1, 7, model.unet.context_dim), torch.zeros(1, model.big_g.embed_dim))
    task = UNetTask(network, given, lambda captions: pytest.fail("features are given"), config, empty)
    loss = task.step(0, torch.Generator().manual_seed(SEED))[0]
    loss.backward()  # type: ignore[no-untyped-call]
    return network, loss.detach()


def drawn(config: UNetTrainConfig) -> tuple[Tensor, Tensor]:
    """The levels [B] and noise [B, 4, h, w] that come out of the pictures' streams of random numbers, in our order."""
    steps, noises = [], []
    for stream in streams(torch.Generator().manual_seed(SEED), range(COUNT)):
        torch.randn(1, 4, *SIZE, generator=stream)  # of the posterior, which has no width here
        steps.append(torch.randint(config.timestep_min, config.timestep_max + 1, (1,), generator=stream))
        noise = torch.randn(1, 4, *SIZE, generator=stream)
        noises.append(noise + config.noise_offset * torch.randn(1, 1, 1, 1, generator=stream))
    return torch.cat(steps), torch.cat(noises)


def theirs(network: Any, model: ModelConfig, config: UNetTrainConfig, given: Given) -> Tensor:
    """As train_text_to_image_sdxl.py has it, with our random numbers."""
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon" if config.prediction == "eps" else "v_prediction",
        rescale_betas_zero_snr=config.zero_terminal_snr,
    )
    latent = given.latent
    steps, noise = drawn(config)
    rows = zip(SIZES, CROPS, TARGETS, SCORES, strict=True)
    ids = [[*size, *crop, *([score] if model.is_refiner else target)] for size, crop, target, score in rows]
    output = network(
        scheduler.add_noise(latent, noise, steps),
        steps,
        given.text.crossattn,
        added_cond_kwargs={"text_embeds": given.text.pooled, "time_ids": torch.tensor(ids)},
    ).sample
    v = config.prediction == "v"
    target = scheduler.get_velocity(latent, noise, steps) if v else noise
    errors = (output.float() - target.float()).square().mean((1, 2, 3))
    if config.min_snr_gamma:
        snr = compute_snr(scheduler, steps)
        capped = torch.stack([snr, config.min_snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        errors = errors * capped / (snr + 1 if v else snr)
    return errors.mean()


CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "eps": (BASE, {}),
    "v": (BASE, {"prediction": "v"}),
    "min-SNR": (BASE, {"min_snr_gamma": 5.0}),
    "v with min-SNR": (BASE, {"prediction": "v", "min_snr_gamma": 5.0}),
    "offset noise": (BASE, {"noise_offset": 0.3}),
    "zero terminal SNR": (BASE, {"prediction": "v", "zero_terminal_snr": True}),
    "refiner": (REFINER, {"timestep_max": 199}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_all_gradients_are_those_of_diffusers(case: str) -> None:
    model, changes = CASES[case]
    config = UNetTrainConfig(text_dropout=0.0, memory="none", loop=LoopConfig(dtype="fp32"), **changes)
    given = Given(model)
    network, loss = ours(model, config, given)
    peer = diffusers_unet(network.unet, model).requires_grad_(True)
    expected = theirs(peer, model, config, given)
    expected.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(expected.item(), rel=LIMIT)
    gradients = {name: p.grad for name, p in network.unet.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(network.unet.parameters()))
    named = taken(gradients, unet_to_diffusers(gradients, model.unet))
    errors = {
        name: float((named[name] - p.grad).norm() / p.grad.norm()) for name, p in peer.named_parameters()
    }
    assert named.keys() == errors.keys()
    worst = max(errors, key=lambda name: errors[name])
    print(f"{case}: loss {float(loss):.6f}, {len(errors)} gradients, worst {errors[worst]:.1e} of {worst}")
    assert errors[worst] < LIMIT


def test_another_objective_has_other_gradients() -> None:
    """The comparison above would see each of its cases mistaken for another."""
    found = {}
    for case, (model, changes) in CASES.items():
        if model is BASE:
            config = UNetTrainConfig(text_dropout=0.0, memory="none", **changes)
            network, _ = ours(model, config, Given(model))
            gradient = network.unet.out[2].get_parameter("weight").grad
            assert gradient is not None
            found[case] = gradient / gradient.norm()
    names = list(found)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            assert float((found[one] - found[other]).norm()) > 100 * LIMIT, (one, other)


def test_weights_in_bf16_keep_close_to_it() -> None:
    """In bf16 with fp32 sums the gradient points where the one in fp32 points."""
    given, config = Given(BASE), UNetTrainConfig(text_dropout=0.0, memory="none")
    exact, _ = ours(BASE, config, given)
    low = SDXL(BASE, ("unet", "text"))
    low.load_state_dict(exact.state_dict())
    low.requires_grad_(False).unet.requires_grad_(True)
    low.to(torch.bfloat16)
    empty = TextFeatures(torch.zeros(1, 7, BASE.unet.context_dim), torch.zeros(1, BASE.big_g.embed_dim))
    task = UNetTask(
        low, given, lambda captions: pytest.fail("given"), replace(config, weight_dtype="bf16"), empty
    )
    task.step(0, torch.Generator().manual_seed(SEED))[0].backward()  # type: ignore[no-untyped-call]
    pairs = zip(exact.unet.parameters(), low.unet.parameters(), strict=True)
    both = [
        (a.grad.flatten(), b.grad.float().flatten())
        for a, b in pairs
        if a.grad is not None and b.grad is not None
    ]
    one, other = torch.cat([a for a, _ in both]), torch.cat([b for _, b in both])
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    print(f"bf16: cosine {cosine:.5f}, length {float(other.norm() / one.norm()):.4f}")
    assert cosine > 0.95
    assert float(other.norm() / one.norm()) == pytest.approx(1.0, abs=0.05)
