"""What a training step of the U-Net is (paper sections 2.2, 2.3, 2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.model.conditioning import MicroConditioning, TextFeatures, condition
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Moments
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.losses import add_noise, training_noise, weighted_mse


@dataclass(frozen=True, slots=True)
class Example:
    """A picture as the U-Net is trained on it."""

    moments: Moments
    """Of its unscaled latent, [z, h, w] each."""
    ids: tuple[tuple[Tensor, Tensor], ...]
    """Token ids [77] for CLIP-L and for bigG, of every caption it has."""
    micro: MicroConditioning


class Batches(Protocol):
    """Which examples a step trains on."""

    def batch(self, step: int) -> Sequence[int]:
        """Indices of examples with latents of one size; a function of the step alone."""
        ...


@dataclass
class UNetTask:
    """Noise levels and captions drawn at random, for the examples of a step."""

    module: SDXL
    examples: Sequence[Example]
    batches: Batches
    config: UNetTrainConfig

    def __post_init__(self) -> None:
        self.schedule = NoiseSchedule()

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """See :class:`~sdxl_cli.training.loop.Task`."""
        config, model = self.config, self.module
        examples = [self.examples[i] for i in self.batches.batch(index)]
        latent = self._latents(examples, generator)
        levels = torch.randint(
            config.timestep_min, config.timestep_max + 1, (len(examples),), generator=generator
        )
        noise = training_noise(tuple(latent.shape), config.noise_offset, generator)
        sigma = self.schedule.sigmas[levels]
        noised = add_noise(latent, noise, sigma, config.prediction, config.min_snr_gamma)
        text = self._dropped(self._text(examples, generator), generator)
        cond = condition(model.config, text, [example.micro for example in examples])
        network_input = noised.network_input.contiguous(memory_format=torch.channels_last)
        output = model.unet(network_input, levels, cond.crossattn, cond.vector)
        loss, per_sample = weighted_mse(output, noised)
        return loss, {"images": float(len(examples)), "mse": float(per_sample.mean())}

    def _latents(self, examples: Sequence[Example], generator: torch.Generator) -> Tensor:
        mean, logvar = (
            torch.stack([getattr(example.moments, name) for example in examples]).float()
            for name in ("mean", "logvar")
        )
        noise = torch.randn(mean.shape, generator=generator)
        return Moments(mean, logvar).sample(noise) * self.module.config.vae.scale_factor

    def _text(self, examples: Sequence[Example], generator: torch.Generator) -> TextFeatures:
        picks = torch.rand(len(examples), generator=generator).tolist()
        chosen = [example.ids[int(u * len(example.ids))] for example, u in zip(examples, picks, strict=True)]
        ids_l, ids_g = (torch.stack(ids) for ids in zip(*chosen, strict=True))
        with torch.set_grad_enabled(self.config.train_text_encoders):
            return self.module.conditioner.text(ids_l, ids_g)

    def _dropped(self, text: TextFeatures, generator: torch.Generator) -> TextFeatures:
        """Zero features at random, as classifier-free guidance needs (facts §4: ucg_rate)."""
        config, clip_l = self.config, self.module.config.clip_l
        widths = [clip_l.width] if clip_l else []
        widths.append(self.module.config.big_g.width)
        outputs = len(widths) + 1
        joint = config.text_dropout_mode == "joint"
        draws = torch.rand(len(text.pooled), 1 if joint else outputs, generator=generator)
        keep = (draws >= config.text_dropout).float().expand(-1, outputs)
        crossattn = torch.cat(
            [part * keep[:, i, None, None] for i, part in enumerate(text.crossattn.split(widths, dim=-1))],
            dim=-1,
        )
        return TextFeatures(crossattn, text.pooled * keep[:, -1:])
