"""The parts of the work, each as something that can be run again and again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from sdxl_cli.bench.setting import CaseName, Setting, Silent, noise
from sdxl_cli.bench.weights import load
from sdxl_cli.data.loader import Batch, Latents
from sdxl_cli.generation.autoencode import decode, encode
from sdxl_cli.generation.encode import Prompts, encode_prompts, guided
from sdxl_cli.generation.pipeline import Models, generate
from sdxl_cli.model.conditioning import TextFeatures
from sdxl_cli.model.config import ModelConfig, Part
from sdxl_cli.training.config import LoopConfig, UNetTrainConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.unet_task import UNetTask

Work = Callable[[], object]
Prepared = Generator[Work, None, None]
"""Gives one thing to run; what was needed for it goes when it is closed."""
TOKENS = 77
SMALLEST = 8
"""Latents a side of a step that is made for what it leaves behind."""
_UNET: tuple[Part, ...] = ("unet",)


@dataclass(frozen=True, slots=True)
class Case:
    """A row."""

    label: str
    unit: str
    """What ``count`` of it are done in one run."""
    prepare: Callable[[Setting], Prepared]
    parts: tuple[Part, ...]
    """What has to be loaded."""
    count: Callable[[Setting], int] = lambda setting: setting.request.batch


def _text(setting: Setting) -> Prepared:
    yield lambda: encode_prompts(setting.asked, setting.weights)


def features(config: ModelConfig, seed: int, *, zeros: bool = False) -> TextFeatures:
    """Random text features of one prompt, or zeros, as the released base has them without a negative prompt."""
    made = TextFeatures(
        noise(1, TOKENS, config.unet.context_dim, seed=seed), noise(1, config.big_g.embed_dim, seed=seed + 1)
    )
    return made.zeros() if zeros else made


def _to(text: TextFeatures, like: Tensor) -> TextFeatures:
    return TextFeatures(text.crossattn.to(like), text.pooled.to(like))


def guided_step(setting: Setting, prompts: Prompts) -> Callable[[Tensor, float], Tensor]:
    """The U-Net with both sides of guidance, as ``sdxl generate`` calls it: (latents, sigma) -> denoised."""
    like = torch.empty(0, dtype=setting.weights.dtype, device=setting.weights.device)
    both = Prompts(_to(prompts.positive, like), _to(prompts.negative, like))
    plan = setting.plan
    return guided(setting.weights, both, plan.framing, plan.request, plan.sigmas, setting.request.batch)


def _unet(setting: Setting) -> Prepared:
    config = setting.files.config
    zeros = not (setting.request.negative or config.is_refiner)
    step = guided_step(setting, Prompts(features(config, 1), features(config, 3, zeros=zeros)))
    sigma = float(setting.plan.sigmas[0])
    x = (noise(*setting.latent_shape) * sigma).to(setting.weights.device)
    step(x[:, :, :SMALLEST, :SMALLEST], sigma)  # what is made once of a prompt belongs to no step
    yield lambda: step(x, sigma)


def _decode(setting: Setting) -> Prepared:
    latents = noise(*setting.latent_shape)
    setting.weights.vae()
    yield lambda: [decode(latent[None], setting.weights) for latent in latents]


def _encode(setting: Setting) -> Prepared:
    pictures = noise(setting.request.batch, 3, *setting.size).clamp(-1, 1)
    setting.weights.vae()
    yield lambda: [encode(picture[None], setting.weights) for picture in pictures]


def _image(setting: Setting) -> Prepared:
    models = Models(base=setting.weights)
    yield lambda: list(generate(setting.plan, models, Silent()))


class _SameBatch:
    """The same noise for pictures at every step, with features of its captions."""

    def __init__(self, setting: Setting) -> None:
        shape, config = setting.latent_shape, setting.files.config
        mean, count = noise(*shape) / config.vae.scale_factor, shape[0]
        text = features(config, 1)
        self._batch = Batch(
            images=None,
            latents=Latents(mean, torch.full_like(mean, -20.0)),
            captions=[""] * count,
            original_size=[setting.size] * count,
            crop_top_left=[(0, 0)] * count,
            target_size=[setting.size] * count,
            aesthetic_score=[6.0] * count,
            ids=["noise"] * count,
            weight=torch.ones(count),
            text=TextFeatures(text.crossattn.expand(count, -1, -1), text.pooled.expand(count, -1)),
        )

    def batch(self, step: int) -> Batch:
        return self._batch


@contextmanager
def training(setting: Setting) -> Iterator[Run]:
    """A run of the U-Net's training in fp32 weights, with AdamW, without averages and with cached features.

    It computes in fp32 where the networks do, else in bf16.
    """
    config, device = setting.files.config, setting.weights.device
    setting.weights.forget()
    model = load(setting.files, _UNET, torch.float32, device)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a file's pages are not to be written to
    model.to(memory_format=torch.channels_last).requires_grad_(True).train()
    computes: Literal["fp32", "bf16"] = "fp32" if setting.weights.dtype == torch.float32 else "bf16"
    loop = LoopConfig(
        batch_size=setting.request.batch, ema_decay=0.0, device=str(device), dtype=computes, max_steps=1000
    )
    task = UNetTask(
        model,
        _SameBatch(setting),
        lambda captions: (torch.empty(0), torch.empty(0)),
        UNetTrainConfig(loop=loop),
        empty_text=features(config, 5),
    )
    with TemporaryDirectory() as folder:
        yield Run(task, loop, Path(folder), {})


def _train(setting: Setting) -> Prepared:
    with training(setting) as run:
        yield lambda: run.advance(run.progress.step)


CASES: Mapping[CaseName, Case] = {
    "text": Case("text encoders, both prompts", "prompts", _text, ("text",), lambda setting: 1),
    "unet": Case("U-Net step with guidance", "steps", _unet, ("unet",), lambda setting: 1),
    "decode": Case("autoencoder, decoding", "pictures", _decode, ("vae",)),
    "encode": Case("autoencoder, encoding", "pictures", _encode, ("vae",)),
    "image": Case("prompt to picture", "pictures", _image, ("text", "unet", "vae")),
    "train": Case("training step of the U-Net", "pictures", _train, ("unet",)),
}
"""Rows by their name for ``--only``, in the order they run."""
