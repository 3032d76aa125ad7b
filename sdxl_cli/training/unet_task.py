"""What a training step of the U-Net is (paper sections 2.2, 2.3, 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sdxl_cli.data.loader import Batch
from sdxl_cli.diffusion.formulation import Formulation
from sdxl_cli.model.conditioning import MicroConditioning, TextFeatures, condition
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Moments
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.losses import add_noise, training_noise, weighted_mse

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Captions -> token ids [B, 77] for CLIP-L and for bigG."""


class Batches(Protocol):
    """Which pictures a step trains on."""

    def batch(self, step: int) -> Batch:
        """Latents of one size, captions and micro-conditions; a function of the step alone."""
        ...


@dataclass
class UNetTask:
    """Noise levels drawn at random, for the pictures of a step."""

    module: SDXL
    """The U-Net and the text encoders; what requires gradients is trained."""
    batches: Batches
    tokenize: Tokenize
    config: UNetTrainConfig

    def __post_init__(self) -> None:
        self.schedule = Formulation(self.config.prediction, self.config.zero_terminal_snr).schedule()

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """See :class:`~sdxl_cli.training.loop.Task`."""
        config, model = self.config, self.module
        batch = self.batches.batch(index)
        latent = self._latent(batch, generator)
        count = len(latent)
        levels = torch.randint(config.timestep_min, config.timestep_max + 1, (count,), generator=generator)
        noise = training_noise(tuple(latent.shape), config.noise_offset, generator)
        sigma = self.schedule.sigmas[levels]
        noised = add_noise(latent, noise, sigma, config.prediction, config.min_snr_gamma)
        noised = replace(noised, weight=noised.weight * batch.weight)
        text = self._text(batch.captions, generator)
        cond = condition(model.config, text, micro_conditions(batch))
        network_input = noised.network_input.contiguous(memory_format=torch.channels_last)
        output = model.unet(network_input, levels, cond.crossattn, cond.vector)
        loss, per_sample = weighted_mse(output, noised)
        return loss, {"images": float(count), "mse": float(per_sample.mean())}

    def _latent(self, batch: Batch, generator: torch.Generator) -> Tensor:
        assert batch.latents is not None, "the loader must have a latent cache"
        moments = Moments(batch.latents.mean, batch.latents.logvar)
        noise = torch.randn(moments.mean.shape, generator=generator)
        return moments.sample(noise) * self.module.config.vae.scale_factor

    def _text(self, captions: Sequence[str], generator: torch.Generator) -> TextFeatures:
        """Features of the captions, some of them taken away."""
        config = self.config
        if config.text_dropout_mode == "empty":  # facts §4: legacy_ucg_value
            draws = torch.rand(len(captions), generator=generator).tolist()
            kept = zip(draws, captions, strict=True)
            captions = ["" if draw < config.text_dropout else caption for draw, caption in kept]
        with torch.set_grad_enabled(config.train_text_encoders):
            text = self.module.conditioner.text(*self.tokenize(captions))
        return text if config.text_dropout_mode == "empty" else self._dropped(text, generator)

    def _dropped(self, text: TextFeatures, generator: torch.Generator) -> TextFeatures:
        """Zero features at random, as classifier-free guidance needs (facts §4: ucg_rate)."""
        config, clip_l = self.config, self.module.config.clip_l
        widths = [clip_l.width] if clip_l else []
        widths.append(self.module.config.big_g.width)
        outputs = len(widths) + 1
        draws = torch.rand(
            len(text.pooled), 1 if config.text_dropout_mode == "joint" else outputs, generator=generator
        )
        keep = (draws >= config.text_dropout).float().expand(-1, outputs)
        parts = torch.split(text.crossattn, widths, dim=-1)
        crossattn = torch.cat([part * keep[:, i, None, None] for i, part in enumerate(parts)], dim=-1)
        return TextFeatures(crossattn, text.pooled * keep[:, -1:])


def micro_conditions(batch: Batch) -> list[MicroConditioning]:
    """What each picture of a batch is conditioned on."""
    columns = zip(
        batch.original_size, batch.crop_top_left, batch.target_size, batch.aesthetic_score, strict=True
    )
    return [
        MicroConditioning(original_size=size, crop_top_left=crop, target_size=target, aesthetic_score=score)
        for size, crop, target, score in columns
    ]
