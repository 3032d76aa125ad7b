"""Our side: what ``sdxl`` runs, taken apart as little as possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from job import CFG, PROMPT, Job, latents, picture, sigma, text
from torch import Tensor

from sdxl_cli.bench.cases import SMALLEST, guided_step
from sdxl_cli.bench.setting import BenchRequest, Setting, Silent
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.generation.autoencode import decoded, encode
from sdxl_cli.generation.encode import Prompts, encode_prompts
from sdxl_cli.generation.pipeline import Models, generate
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.session import open_weights
from sdxl_cli.model.conditioning import TextFeatures

PACKAGES = ("safetensors", "transformers", "open_clip_torch")

Work = Callable[..., Tensor]
"""Does a job once; of a picture it can be told the steps."""


def build(job: Job, variant: str) -> Work:
    """Something that does the job once and gives its result.

    Variants: ``no-winograd``; ``med``, with which one part at a time is loaded, as by ``--vram med``. Otherwise all
    parts that were used stay.
    """
    request = GenerateRequest(
        prompt=PROMPT,
        size=f"{job.width}x{job.height}",
        steps=job.steps,
        cfg_scale=CFG,
        sampler="euler",
        scheduler="leading",
        seed=0,
        num_images=job.batch,
        batch_size=job.batch,
        device=job.device,
        dtype=job.dtype,  # type: ignore[arg-type]
        vae_dtype=job.dtype,  # type: ignore[arg-type]
        winograd=variant != "no-winograd",
        vram="med" if variant == "med" else "high",
    )
    files = locate(job.folder)
    (weights,) = open_weights([files], request, Silent())
    plan = plan_generation(request, files.config)
    setting = Setting(request=BenchRequest(batch=job.batch), files=files, weights=weights, plan=plan)
    return {"unet": _unet, "decode": _decode, "encode": _encode, "text": _text, "image": _image}[job.kind](
        job, setting
    )


def _unet(job: Job, setting: Setting) -> Work:
    config, level = setting.files.config, sigma()
    given = text(config.unet.context_dim, config.big_g.embed_dim, job)
    sides = {name: TextFeatures(*features) for name, features in given.items()}
    step = guided_step(setting, Prompts(**sides))
    x = (latents(job) * level).to(setting.weights.device)
    step(x[:, :, :SMALLEST, :SMALLEST], level)
    return lambda: (x - step(x, level)) / level


def _decode(job: Job, setting: Setting) -> Work:
    z = latents(job)
    setting.weights.vae()
    return lambda: torch.cat([decoded(one[None], setting.weights) for one in z])


def _encode(job: Job, setting: Setting) -> Work:
    images = picture(job)
    setting.weights.vae()
    return lambda: torch.cat([encode(one[None], setting.weights).mean for one in images])


def _text(job: Job, setting: Setting) -> Work:
    setting.weights.text()
    return lambda: encode_prompts(setting.asked, setting.weights).positive.crossattn


def _image(job: Job, setting: Setting) -> Work:
    models = Models(base=setting.weights)

    def work(steps: int = job.steps) -> Tensor:
        plan = plan_generation(replace(setting.asked, steps=steps), setting.files.config)
        pictures = [torch.from_numpy(made.pixels) for made in generate(plan, models, Silent())]
        return torch.stack(pictures).float() / 255

    return work
