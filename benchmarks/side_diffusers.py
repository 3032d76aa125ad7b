"""The peer: diffusers, with the settings that people get and with those that its documentation says are faster.

Variants: ``default``; ``best`` (channels last, fused QKV projections; SDPA is the default anyway); ``tiling`` (the
autoencoder sliced and in tiles: less memory, other pixels); ``compiled`` (``best`` and torch.compile, max-autotune).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from job import CFG, LEVEL, PROMPT, Job, latents, picture, sigma, text
from torch import Tensor

from sdxl_cli.diffusion.noise import NoiseStreams

PACKAGES = ("diffusers", "safetensors", "transformers", "accelerate")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST = 8

Work = Callable[..., Tensor]
"""Does a job once; of a picture it can be told the steps."""


def build(job: Job, variant: str) -> Work:
    """Something that does the job once and gives its result."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # older versions know no other name
    kinds = {"unet": _unet, "decode": _decode, "encode": _encode, "text": _text, "image": _image}
    return kinds[job.kind](job, variant)


def _loaded(cls: Any, job: Job, part: str, variant: str) -> Any:
    network = cls.from_pretrained(f"{job.folder}/{part}", torch_dtype=DTYPES[job.dtype]).to(job.device).eval()
    return _tuned(network, variant)


def _tuned(network: Any, variant: str) -> Any:
    if variant in ("best", "compiled"):
        network.fuse_qkv_projections()
        network.to(memory_format=torch.channels_last)
    if variant == "tiling" and hasattr(network, "enable_tiling"):
        network.enable_tiling()
        network.enable_slicing()
    return network


def _compiled(function: Any, variant: str) -> Any:
    return torch.compile(function, mode="max-autotune", fullgraph=True) if variant == "compiled" else function


def _unet(job: Job, variant: str) -> Work:
    from diffusers import UNet2DConditionModel

    unet = _loaded(UNet2DConditionModel, job, "unet", variant)
    config, like = unet.config, next(unet.parameters())
    numbers = 6 * config.addition_time_embed_dim
    given = text(config.cross_attention_dim, config.projection_class_embeddings_input_dim - numbers, job)
    rows = [given["negative"]] * job.batch + [given["positive"]] * job.batch
    context, pooled = (torch.cat(parts).to(like) for parts in zip(*rows, strict=True))
    ids = [[job.height, job.width, 0, 0, job.height, job.width]] * (2 * job.batch)
    added = {"text_embeds": pooled, "time_ids": torch.tensor(ids, device=job.device).to(like)}
    level = sigma()
    x = (latents(job) * level).to(job.device)
    if like.dtype == torch.float64:
        x = x.double()
    timestep = torch.tensor(LEVEL, device=job.device)
    call = _compiled(unet, variant)

    def step(x: Tensor) -> Tensor:
        scaled = (torch.cat([x, x]) / (level**2 + 1) ** 0.5).to(like.dtype)
        output = call(
            scaled,
            timestep,
            encoder_hidden_states=context,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        negative, positive = output.chunk(2)
        return negative + CFG * (positive - negative)

    if variant != "compiled":
        step(x[:, :, :SMALLEST, :SMALLEST])
    return lambda: step(x)


def _decode(job: Job, variant: str) -> Work:
    from diffusers import AutoencoderKL

    vae = _loaded(AutoencoderKL, job, "vae", variant)
    z = latents(job).to(job.device, DTYPES[job.dtype])
    call = _compiled(vae.decode, variant)
    return lambda: call(z / vae.config.scaling_factor, return_dict=False)[0]


def _encode(job: Job, variant: str) -> Work:
    from diffusers import AutoencoderKL

    vae = _loaded(AutoencoderKL, job, "vae", variant)
    image = picture(job).to(job.device, DTYPES[job.dtype])
    return lambda: vae.encode(image).latent_dist.mean


def pipeline(job: Job, variant: str) -> Any:
    """The whole of it, as its documentation has it."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(
        job.folder, torch_dtype=DTYPES[job.dtype], add_watermarker=False
    )
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(job.device)
    for network in (pipe.unet, pipe.vae):
        _tuned(network, variant)
    pipe.unet = _compiled(pipe.unet, variant)
    pipe.vae.decode = _compiled(pipe.vae.decode, variant)
    return pipe


def _text(job: Job, variant: str) -> Work:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(
        job.folder, unet=None, vae=None, torch_dtype=DTYPES[job.dtype], add_watermarker=False
    ).to(job.device)
    return lambda: pipe.encode_prompt(PROMPT, device=job.device, do_classifier_free_guidance=True)[0]


def _image(job: Job, variant: str) -> Work:
    pipe = pipeline(job, variant)
    start = NoiseStreams(range(job.batch)).next((4, job.height // 8, job.width // 8))

    def work(steps: int = job.steps) -> Tensor:
        pictures = pipe(
            PROMPT,
            height=job.height,
            width=job.width,
            num_inference_steps=steps,
            guidance_scale=CFG,
            num_images_per_prompt=job.batch,
            latents=start.to(job.device, DTYPES[job.dtype]),
            output_type="np",
        ).images
        return torch.from_numpy(pictures)

    return work
