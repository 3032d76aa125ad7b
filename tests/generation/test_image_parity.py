"""Pictures that start from pictures, against diffusers' pipelines with the same small random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.generation.encode import encode_prompts
from sdxl_cli.generation.pipeline import Run
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.start import encode_source
from sdxl_cli.generation.weights import LoadedWeights
from sdxl_cli.model.sdxl import SDXL
from tests.generation.conftest import BASE
from tests.generation.test_pipeline import Silent
from tests.model.peers import diffusers_unet, diffusers_vae, randomize, relative

BOUND = 4e-5
"""Measured 3e-6 … 1e-5; diffusers has the table of noise levels in single precision."""
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
SCHEDULERS: dict[str, Any] = {
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
STEPS = 10
SIZE = (64, 48)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def model(in_channels: int) -> LoadedWeights:
    config = replace(BASE, unet=replace(BASE.unet, in_channels=in_channels))
    sdxl = SDXL(config).eval().requires_grad_(False)
    randomize(sdxl.unet)
    randomize(sdxl.vae, stream=1.0)
    return LoadedWeights(sdxl, "random")


@pytest.fixture(scope="module")
def plain() -> LoadedWeights:
    return model(4)


@pytest.fixture(scope="module")
def inpainting() -> LoadedWeights:
    return model(9)


@pytest.fixture
def request_() -> GenerateRequest:
    """A picture and a mask along whole latents, which every way of shrinking a mask takes for the same."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save("photo.png")
    mask = np.zeros(SIZE, np.uint8)
    mask[16:48, 8:40] = 255
    Image.fromarray(mask).save("mask.png")
    return GenerateRequest(
        prompt="a red guitar",
        seed=3,
        steps=STEPS,
        sampler="euler",
        scheduler="trailing",
        init_img="photo.png",
    )


@torch.inference_mode()
def ours(request: GenerateRequest, weights: LoadedWeights) -> Tensor:
    plan = plan_generation(request, weights.config)
    streams = NoiseStreams([request.seed])
    run = Run(plan, [request.seed], streams, encode_source(plan, weights, Silent()).start(plan, streams))
    run.advance(weights, encode_prompts(request, weights), plan.steps, Silent())
    return run.latents


@torch.inference_mode()
def theirs(kind: Any, request: GenerateRequest, weights: LoadedWeights, steps: int, **options: Any) -> Tensor:
    """``steps`` of ``STEPS``; their rule is int(strength · n), ours the original's int(strength · (n + 1)) - 1."""
    pipeline = kind(
        vae=diffusers_vae(weights.vae(), weights.config.vae),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=diffusers_unet(weights.unet(), weights.config),
        scheduler=SCHEDULERS[request.sampler](**SCHEDULE),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = encode_prompts(request, weights)
    return pipeline(
        prompt_embeds=prompts.positive.crossattn,
        pooled_prompt_embeds=prompts.positive.pooled,
        negative_prompt_embeds=prompts.negative.crossattn,
        negative_pooled_prompt_embeds=prompts.negative.pooled,
        image=Image.open("photo.png"),
        strength=(steps + 0.01) / STEPS,
        num_inference_steps=STEPS,
        guidance_scale=request.cfg_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        **options,
    ).images


def strength_for(steps: int) -> float:
    return (steps + 1.01) / (STEPS + 1)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("steps", [3, 8])
def test_image_to_image(request_: GenerateRequest, plain: LoadedWeights, sampler: str, steps: int) -> None:
    request = replace(request_, sampler=sampler, strength=strength_for(steps))
    expected = theirs(diffusers.StableDiffusionXLImg2ImgPipeline, request, plain, steps)
    error = relative(ours(request, plain), expected)
    print(f"{sampler}, {steps} steps: {error:.1e}")
    assert error < BOUND


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("steps", [3, 8])
def test_inpainting_with_a_plain_unet(
    request_: GenerateRequest, plain: LoadedWeights, sampler: str, steps: int
) -> None:
    """They put the known part back after every step, we show it to the network: the same, step by step."""
    request = replace(request_, sampler=sampler, strength=strength_for(steps), mask="mask.png")
    expected = theirs(
        diffusers.StableDiffusionXLInpaintPipeline,
        request,
        plain,
        steps,
        mask_image=Image.open("mask.png"),
        height=SIZE[0],
        width=SIZE[1],
    )
    error = relative(ours(request, plain), expected)
    print(f"{sampler}, {steps} steps: {error:.1e}")
    assert error < BOUND
    unmasked = ours(replace(request, mask=None), plain)
    assert relative(unmasked, expected) > 0.01, "the mask makes no difference"


def test_inpainting_with_nine_channels(request_: GenerateRequest, inpainting: LoadedWeights) -> None:
    request = replace(request_, strength=strength_for(8), mask="mask.png")
    expected = theirs(
        diffusers.StableDiffusionXLInpaintPipeline,
        request,
        inpainting,
        8,
        mask_image=Image.open("mask.png"),
        height=SIZE[0],
        width=SIZE[1],
    )
    assert relative(ours(request, inpainting), expected) < BOUND


def test_an_inpainting_unet_makes_pictures_from_nothing(inpainting: LoadedWeights) -> None:
    """It is told what diffusers' pipeline tells it under a mask that is white all over: nothing is known."""
    request = GenerateRequest(prompt="a red guitar", seed=1, steps=2)
    plan = plan_generation(request, inpainting.config)
    Image.new("RGB", (64, 64), "red").save("photo.png")
    Image.new("L", (64, 64), "white").save("white.png")
    masked = plan_generation(replace(request, init_img="photo.png", mask="white.png"), inpainting.config)
    with torch.inference_mode():
        blank, white = (encode_source(p, inpainting, Silent()) for p in (plan, masked))
        assert ours(request, inpainting).isfinite().all()
    assert blank.remaining is not None
    assert white.remaining is not None
    assert torch.equal(blank.remaining.mean, white.remaining.mean)
    start = blank.start(plan, NoiseStreams([1]))
    assert start.seen is not None
    assert start.seen.shape == (1, 5, 8, 8)
    assert start.seen[:, 0].eq(1).all()
