"""More than one pass: the larger one, the refiner's own, and the cut between two experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.generation.autoencode import decode, encode, to_image
from sdxl_cli.generation.encode import Prompts, encode_prompts, guided
from sdxl_cli.generation.hires import enlarged, later_streams
from sdxl_cli.generation.pipeline import Models, generate, started
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.start import encode_source
from sdxl_cli.generation.weights import LoadedWeights
from sdxl_cli.model.config import ModelConfig
from sdxl_cli.model.sdxl import SDXL
from tests.generation.conftest import BASE, REFINER
from tests.generation.test_pipeline import REQUEST, Silent, made, weights
from tests.model.peers import diffusers_unet, diffusers_vae, randomize, relative

LARGER = replace(REQUEST, hires_scale=1.5, hires_steps=3, hires_denoising_strength=0.5)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def final(request: GenerateRequest, base: Path) -> Tensor:
    """The latents of a single pass."""
    model = weights(base)
    plan = plan_generation(request, model.config)
    run = started(plan, [request.seed], model, encode_source(plan, model, Silent()))
    run.advance(model, encode_prompts(request, model), plan.steps, Silent())
    return run.latents


def test_a_larger_pass_is_said_and_runs_exactly_the_steps_asked_for() -> None:
    plan = plan_generation(LARGER, BASE)
    assert plan.split() == "base: 4 steps t=999→249 | then 96x96, base: 3 steps t=428→142"
    (second,) = plan.after
    assert second.framing.original_size == second.framing.target_size == (96, 96)
    for steps in range(1, 40):
        for strength in (0.05, 0.3, 0.7, 1.0):
            request = replace(LARGER, hires_steps=steps, hires_denoising_strength=strength)
            assert plan_generation(request, BASE).after[0].steps == steps


def test_the_larger_pass_is_noise_on_the_stretched_latents_and_the_last_steps(
    models: dict[str, Path],
) -> None:
    first = final(replace(REQUEST), models["base"])
    model = weights(models["base"])
    (second,) = plan_generation(LARGER, model.config).after
    x = functional.interpolate(first, size=(12, 12), mode="bilinear")
    x = x + later_streams([5], 1).next((4, 12, 12)) * second.sigmas[0]
    prompts = encode_prompts(LARGER, model)
    denoise = guided(model, prompts, second.framing, LARGER, second.sigmas, batch=1)
    *_, x = second.sampler.steps(denoise, x, second.sigmas, NoiseStreams([0]))
    expected = decode(x, model)
    (picture,) = made(LARGER, models["base"])
    assert np.array_equal(picture.pixels, expected)


def test_lanczos_enlarges_each_picture_with_its_own_noise(models: dict[str, Path]) -> None:
    model = weights(models["base"])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (second,) = plan_generation(LARGER, model.config).after

    def grown(values: Tensor, *seeds: int) -> Tensor:
        return enlarged(values, second, "lanczos", model, later_streams(seeds, 1), Silent())

    both = grown(latents, 1, 2)
    assert both.shape == (2, 4, 12, 12)
    for index, seed in enumerate((1, 2)):
        image = Image.fromarray(decode(latents[index : index + 1], model)).resize(
            (96, 96), Image.Resampling.LANCZOS
        )
        moments = encode(to_image(np.asarray(image)), model)
        expected = moments.sample(later_streams([seed], 1).next((4, 12, 12))) * BASE.vae.scale_factor
        assert torch.equal(both[index], expected[0])


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_company_changes_nothing_in_the_larger_pass(models: dict[str, Path], upscaler: Any) -> None:
    request = replace(LARGER, hires_upscaler=upscaler)
    together = made(replace(request, num_images=2, batch_size=2), models["base"])
    alone = made(replace(request, seed=6), models["base"])
    assert together[1].pixels.shape == (96, 96, 3)
    assert np.array_equal(together[1].pixels, alone[0].pixels)
    freed = made(replace(request, num_images=2), models["base"], stays=False)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(together, freed, strict=True))


def test_later_noise_is_new_and_each_pictures_own() -> None:
    shape = (4, 8, 8)
    first, second, other = (
        streams.next(shape) for streams in (NoiseStreams([5]), later_streams([5], 1), later_streams([6], 1))
    )
    assert abs(float((first * second).mean())) < 0.2
    assert abs(float((other * second).mean())) < 0.2
    assert torch.equal(later_streams([5, 6], 1).next(shape)[1:], other)


def test_the_refiner_as_a_pass_of_its_own(models: dict[str, Path]) -> None:
    request = replace(
        REQUEST, steps=10, refiner=str(models["refiner"]), refiner_mode="sdedit", refiner_strength=0.4
    )
    plan = plan_generation(request, BASE, REFINER)
    assert plan.split() == "base: 10 steps t=999→99 | then refiner: 3 steps t=299→99"
    base, refiner = weights(models["base"]), weights(models["refiner"])
    x = final(replace(REQUEST, steps=10), models["base"])
    (second,) = plan.after
    x = x + later_streams([5], 1).next((4, 8, 8)) * second.sigmas[0]
    prompts = encode_prompts(request, refiner)
    denoise = guided(refiner, prompts, second.framing, request, second.sigmas, batch=1)
    *_, x = second.sampler.steps(denoise, x, second.sigmas, NoiseStreams([0]))
    (picture,) = generate(plan, Models(base=base, refiner=refiner), Silent())
    assert np.array_equal(picture.pixels, decode(x, base))


@pytest.mark.parametrize("scheduler", ["karras", "exponential", "normal"])
def test_the_refiners_own_pass_begins_where_its_strength_says(scheduler: str) -> None:
    request = replace(REQUEST, steps=30, scheduler=scheduler, refiner="r", refiner_mode="sdedit")
    (second,) = plan_generation(request, BASE, REFINER).after
    assert second.timesteps[0] == 266


def test_as_an_ensemble_the_refiner_ends_the_last_pass_only() -> None:
    request = replace(LARGER, steps=10, hires_steps=10, refiner="r")
    plan = plan_generation(request, BASE, REFINER)
    (second,) = plan.after
    assert plan.base_steps == plan.steps
    assert 0 < second.base_steps < second.steps
    assert min(second.timesteps[: second.base_steps]) >= 200 > second.timesteps[second.base_steps]


def random_weights(config: ModelConfig, seed: int) -> LoadedWeights:
    sdxl = SDXL(config).eval().requires_grad_(False)
    randomize(sdxl.unet, seed=seed)
    return LoadedWeights(sdxl, "random")


def pipeline_of(kind: Any, model: LoadedWeights, **options: Any) -> Any:
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    pipeline = kind(
        vae=diffusers_vae(model.vae(), model.config.vae),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=diffusers_unet(model.unet(), model.config),
        scheduler=scheduler,
        add_watermarker=False,
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def texts(prompts: Prompts) -> dict[str, Tensor]:
    return {
        "prompt_embeds": prompts.positive.crossattn,
        "pooled_prompt_embeds": prompts.positive.pooled,
        "negative_prompt_embeds": prompts.negative.crossattn,
        "negative_pooled_prompt_embeds": prompts.negative.pooled,
    }


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("switch", [0.8, 0.55])
def test_the_two_experts_are_those_of_diffusers(switch: float) -> None:
    """denoising_end of the base and denoising_start of the refiner, with Euler."""
    base, refiner = random_weights(BASE, 0), random_weights(REFINER, 1)
    request = replace(REQUEST, scheduler="trailing", steps=10, refiner_switch_at=switch)
    plan = plan_generation(request, base.config, refiner.config)
    run = started(plan, [5], base, encode_source(plan, base, Silent()))
    noise = NoiseStreams([5]).next((4, 8, 8))
    for model, steps in ((base, plan.base_steps), (refiner, plan.steps - plan.base_steps)):
        run.advance(model, encode_prompts(request, model), steps, Silent())

    common = {"num_inference_steps": 10, "guidance_scale": request.cfg_scale, "output_type": "latent"}
    sigma = plan.sigmas[0]
    first = pipeline_of(diffusers.StableDiffusionXLPipeline, base)(
        # they start from sigma alone, the original from sqrt(1 + sigma²)
        latents=noise * (1 + sigma**2).sqrt() / sigma,
        denoising_end=switch,
        height=64,
        width=64,
        **texts(encode_prompts(request, base)),
        **common,
    ).images
    second = pipeline_of(diffusers.StableDiffusionXLImg2ImgPipeline, refiner, requires_aesthetics_score=True)(
        image=first, denoising_start=switch, **texts(encode_prompts(request, refiner)), **common
    ).images
    error = relative(run.latents, second)
    print(f"switch at {switch:g}: {error:.1e}")
    assert error < 4e-5
