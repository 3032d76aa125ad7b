"""Whole runs against diffusers' schedulers and its pipeline, with small random networks, step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sdxl_cli.diffusion.denoiser import Denoiser
from sdxl_cli.diffusion.formulation import Prediction
from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.guidance import Guidance, Guided
from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.generation.remember import Remembering
from sdxl_cli.model.conditioning import MicroConditioning, conditioning_vector
from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder
from tests.diffusion.peers import DIFFUSERS, K_NAMES, Tape, diffusers_path, k_path
from tests.model.peers import BASE, diffusers_unet, diffusers_vae, randomize, relative

BOUND = 3e-5
"""Measured 3e-6 … 5e-6: the rounding of six evaluations of the network, with guidance."""
SCALE = 5.0
MICRO = MicroConditioning(original_size=(96, 64), crop_top_left=(0, 8), target_size=(64, 40))
SMALL = replace(
    BASE,
    unet=replace(BASE.unet, num_res_blocks=1, transformer_depth=(0, 1, 2), transformer_depth_middle=2),
)
SCHEDULE = NoiseSchedule()


@dataclass
class World:
    """A random model of ours and of diffusers', prompts, and where the noise begins."""

    ours: UNet
    theirs: Any
    crossattn: tuple[Tensor, Tensor]
    pooled: tuple[Tensor, Tensor]
    noise: Tensor

    def guided(self, prediction: Prediction) -> Guided:
        micro = [MICRO] * len(self.noise)
        vectors = tuple(conditioning_vector(SMALL, pooled, micro) for pooled in self.pooled)
        return Guided(
            Denoiser(Remembering(self.ours), SCHEDULE, prediction),
            self.crossattn,
            (vectors[0], vectors[1]),
            Guidance(SCALE),
        )

    def their_prediction(self, scaled: Tensor, timestep: Tensor) -> Tensor:
        numbers = [*MICRO.original_size, *MICRO.crop_top_left, *MICRO.target_size]
        added = {
            "text_embeds": torch.cat(self.pooled),
            "time_ids": torch.tensor([numbers] * 2 * len(scaled)),
        }
        out = self.theirs(
            torch.cat([scaled] * 2), timestep, torch.cat(self.crossattn), added_cond_kwargs=added
        )
        negative, positive = out.sample.chunk(2)
        return negative + SCALE * (positive - negative)


def make_world() -> World:
    network = UNet(SMALL.unet)
    randomize(network)
    torch.manual_seed(4)
    width, pooled = SMALL.unet.context_dim, SMALL.big_g.embed_dim
    return World(
        ours=network,
        theirs=diffusers_unet(network, SMALL),
        crossattn=(torch.randn(2, 9, width), torch.randn(2, 9, width)),
        pooled=(torch.randn(2, pooled), torch.randn(2, pooled)),
        noise=torch.randn(2, 4, 8, 5),
    )


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def their_scheduler(sampler: str, prediction: Prediction, sigmas: Tensor) -> Any:
    """diffusers' scheduler on our noise levels, and with our timesteps."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[prediction],
    }
    kinds = {
        "euler": diffusers.EulerDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    }
    scheduler: Any = kinds[sampler](**settings)
    timesteps = [SCHEDULE.index_of(sigma) for sigma in sigmas[:-1].tolist()]
    scheduler.set_timesteps(timesteps=timesteps)
    assert torch.allclose(scheduler.sigmas, sigmas, rtol=2e-5)
    # their table is rounded to single precision one step too early
    scheduler.sigmas = sigmas.clone()
    return scheduler


@torch.no_grad()
def their_path(world: World, sampler: str, prediction: Prediction, sigmas: Tensor) -> list[Tensor]:
    """x after every step, in our scaling: clean + sigma · noise."""
    scheduler = their_scheduler(sampler, prediction, sigmas)
    x = world.noise * (1 + sigmas[0] ** 2).sqrt()
    preserving = sampler == "dpmpp_2m"  # keeps the variance: x / sqrt(1 + sigma²)
    if preserving:
        x = x / (1 + sigmas[0] ** 2).sqrt()
    path = []
    for t, following in zip(scheduler.timesteps, sigmas[1:], strict=True):
        guided = world.their_prediction(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(guided, t, x).prev_sample
        path.append(x * (1 + following**2).sqrt() if preserving else x)
    return path


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@torch.no_grad()
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("grid", ["sgm", "leading", "trailing"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_every_step_of_a_run(world: World, sampler: str, grid: str, prediction: Prediction) -> None:
    sigmas = GRIDS[grid](SCHEDULE, 6)
    x = world.noise * (1 + sigmas[0] ** 2).sqrt()
    ours = list(SAMPLERS[sampler].steps(world.guided(prediction), x, sigmas, NoiseStreams([1, 2])))
    theirs = their_path(world, sampler, prediction, sigmas)
    errors = [relative(a, b) for a, b in zip(ours, theirs, strict=True)]
    print(f"{sampler}, {grid}, {prediction}: first step {errors[0]:.1e}, last {errors[-1]:.1e}")
    assert max(errors) < BOUND


PEERS = {**dict.fromkeys(DIFFUSERS, diffusers_path), **dict.fromkeys(K_NAMES, k_path)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
@pytest.mark.parametrize("sampler", PEERS)
def test_every_sampler_of_others_leads_a_network_the_same_way(world: World, sampler: str) -> None:
    """Our network and guidance inside their samplers, in single precision; the same noise for both."""
    sigmas = GRIDS["lcm" if sampler in ("lcm", "tcd") else "trailing"](SCHEDULE, 5)
    if sampler == "deis":
        sigmas = sigmas[:-1]  # theirs does not go to 0
    x, guided = world.noise * (1 + sigmas[0] ** 2).sqrt(), world.guided("eps")
    ours = list(SAMPLERS[sampler].steps(guided, x, sigmas, Tape()))
    theirs = PEERS[sampler](sampler, guided, x, sigmas, Tape())
    errors = [relative(a, b) for a, b in zip(ours, theirs, strict=True)]
    if sampler == "tcd":
        del errors[-1]  # nor does theirs
    print(f"{sampler}: first step {errors[0]:.1e}, last {errors[-1]:.1e}")
    assert max(errors) < BOUND


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@torch.no_grad()
def test_the_pipeline_of_diffusers_makes_the_same_picture(world: World) -> None:
    """The released scheduler configuration, guidance, sizes, decoding: everything but text and random numbers.

    What remains is the table of noise levels, which diffusers has in single precision.
    """
    vae = Autoencoder(SMALL.vae)
    randomize(vae)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=diffusers_vae(vae, SMALL.vae),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=world.theirs,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "prompt_embeds": world.crossattn[1],
        "negative_prompt_embeds": world.crossattn[0],
        "pooled_prompt_embeds": world.pooled[1],
        "negative_pooled_prompt_embeds": world.pooled[0],
        "original_size": MICRO.original_size,
        "crops_coords_top_left": MICRO.crop_top_left,
        "target_size": MICRO.target_size,
        "height": 64,
        "width": 40,
        "num_inference_steps": 10,
        "guidance_scale": SCALE,
    }
    latents = pipeline(latents=world.noise.clone(), output_type="latent", **options).images
    image = pipeline(latents=world.noise.clone(), output_type="pt", **options).images

    sigmas = GRIDS["leading"](SCHEDULE, 10)
    x = world.noise * (1 + sigmas[0] ** 2).sqrt()
    *_, x = SAMPLERS["euler"].steps(world.guided("eps"), x, sigmas, NoiseStreams([1, 2]))
    decoded = ((vae.decode(vae.from_latent(x)) + 1) / 2).clamp(0, 1)
    errors = relative(x, latents), relative(decoded, image)
    print(f"pipeline: latents {errors[0]:.1e}, image {errors[1]:.1e}")
    assert max(errors) < 5e-5
