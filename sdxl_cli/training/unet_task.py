"""What a training step of the U-Net is (paper sections 2.2, 2.3, 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sdxl_cli.data.loader import Batch
from sdxl_cli.model.conditioning import MicroConditioning, TextFeatures, condition
from sdxl_cli.model.config import SCALAR_COUNT
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Moments
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.draws import Streams, each, streams
from sdxl_cli.training.levels import Drawing, Levels
from sdxl_cli.training.losses import (
    add_noise,
    by_level,
    debiased_weight,
    level_weight,
    training_noise,
    weighted_mse,
)
from sdxl_cli.training.metrics import Mean, statistics
from sdxl_cli.training.place import computing

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
    empty_text: TextFeatures | None = None
    """Features of the empty text [1, …], where the batches have features of their captions."""

    def __post_init__(self) -> None:
        self.drawing = Drawing(self.config)
        self.size: tuple[int, int] | None = None
        """(height, width) in pixels of the pictures of the last step, for who looks on."""

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.module.parameters()).device

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """See :class:`~sdxl_cli.training.loop.Task`."""
        batch = self.batches.batch(index)
        self.size = batch.target_size[0]
        if self.config.lora.dropout:
            # layers draw from torch's own generator; that of the first picture decides it, so that runs can be resumed
            torch.manual_seed(streams(generator, batch.places or (0,))[0].initial_seed())
        loss, per_sample, levels = self._losses(batch, generator)
        seen = batch.weight > 0  # a process that a short batch has no picture for has one that does not count
        if not seen.any():
            return loss, {"images": 0.0}
        per_sample, shown = per_sample.cpu()[seen], levels.index[seen]
        count = len(per_sample)
        means = {"mse": Mean(float(per_sample.mean()), count), **by_level(per_sample, shown)}
        return loss, {"images": float(count), **means}

    def loss(self, index: int, generator: torch.Generator) -> Tensor:
        """The loss of batch ``index`` alone: nothing of it is read, so that it works on the meta device, too."""
        return self._losses(self.batches.batch(index), generator)[0]

    @torch.no_grad()
    def describe(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """See :class:`~sdxl_cli.training.loop.Task`."""
        batch = self.batches.batch(index)
        _, per_sample, levels = self._losses(batch, generator)
        assert batch.latents is not None
        return {
            "ids": batch.ids,
            "captions": batch.captions,
            "sigma": levels.sigma.tolist(),
            "mse": [str(value) for value in per_sample.tolist()],  # JSON has no nan
            "latent mean": statistics(batch.latents.mean),
            "latent logvar": statistics(batch.latents.logvar),
        }

    @torch.no_grad()
    def evaluate(self, batch: Batch, levels: Levels, generator: torch.Generator) -> Tensor:
        """Each picture's error with its whole text at a given noise level, on the CPU [B]."""
        return self._losses(batch, generator, levels)[1].cpu()

    def _losses(
        self, batch: Batch, generator: torch.Generator, levels: Levels | None = None
    ) -> tuple[Tensor, Tensor, Levels]:
        """The loss, each picture's error [B] and noise level; nothing falls out where ``levels`` are given."""
        config, trains = self.config, levels is None
        random = streams(generator, batch.places or range(len(batch)))
        latent = self._latent(batch, random)
        levels = levels or self.drawing.draw_each(random)
        shape = (1, *latent.shape[1:])
        noise = each(random, lambda g: training_noise(shape, config.noise_offset, g)).to(latent.device)
        noised = add_noise(latent, noise, levels.sigma, config.prediction, config.min_snr_gamma)
        weight = noised.weight * batch.weight * level_weight(config.level_weights, levels.index)
        if config.debiased:
            weight = weight * debiased_weight(levels.sigma)
        with self.computing():
            text = self._text(batch, random if trains else None)
            cond = condition(self.module.config, text, micro_conditions(batch))
            vector = self._without_some(cond.vector, random) if trains else cond.vector
            network_input = noised.network_input.contiguous(memory_format=torch.channels_last)
            time = levels.time.to(self.device)
            inputs = (network_input, cond.crossattn, vector)
            if self.low:
                inputs = (inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2].bfloat16())
            output = self.module.unet(inputs[0], time, *inputs[1:])
        loss, per_sample = weighted_mse(output, replace(noised, weight=weight))
        return loss, per_sample, levels

    def computing(self) -> AbstractContextManager[object]:
        """Autocast, unless everything is bf16: norms have fp32 inside, and autocast would only write it out."""
        return nullcontext() if self.low else computing(self.config.loop, self.device)

    @property
    def low(self) -> bool:
        """Whether all weights are bf16."""
        return self.config.weight_dtype == "bf16"

    def _latent(self, batch: Batch, random: Streams) -> Tensor:
        assert batch.latents is not None, "the loader must have a latent cache"
        moments = Moments(batch.latents.mean, batch.latents.logvar)
        shape = (1, *moments.mean.shape[1:])
        noise = each(random, lambda g: torch.randn(shape, generator=g))
        return (moments.sample(noise) * self.module.config.vae.scale_factor).to(self.device)

    def _text(self, batch: Batch, random: Streams | None) -> TextFeatures:
        """Features of the captions, some of them taken away when there are random numbers."""
        config = self.config
        gone = torch.zeros(len(batch), dtype=torch.bool)
        if random and config.text_dropout_mode == "empty":  # facts §4: legacy_ucg_value
            gone = each(random, lambda g: torch.rand(1, generator=g)) < config.text_dropout
        if batch.text is not None:
            text = self._cached(batch.text, gone)
        else:
            captions = zip(gone.tolist(), batch.captions, strict=True)
            text = self._encoded(["" if empty else caption for empty, caption in captions])
        if random is None or config.text_dropout_mode == "empty":
            return text
        return self._dropped(text, random)

    def _encoded(self, captions: Sequence[str]) -> TextFeatures:
        ids_l, ids_g = (ids.to(self.device) for ids in self.tokenize(captions))
        with torch.set_grad_enabled(self.config.train_text_encoders and torch.is_grad_enabled()):
            return self.module.conditioner.text(ids_l, ids_g)

    def _cached(self, text: TextFeatures, gone: Tensor) -> TextFeatures:
        """Features that were read, those of the empty text in the rows of ``gone`` [B]."""
        assert self.empty_text is not None
        crossattn = torch.where(gone[:, None, None], self.empty_text.crossattn, text.crossattn)
        pooled = torch.where(gone[:, None], self.empty_text.pooled, text.pooled)
        # tokens look back only: the first ones do not know how many follow
        crossattn = crossattn[:, : self.config.caption_tokens]
        return TextFeatures(crossattn.to(self.device), pooled.to(self.device))

    def _dropped(self, text: TextFeatures, random: Streams) -> TextFeatures:
        """Zero features at random, as classifier-free guidance needs (facts §4: ucg_rate)."""
        config, clip_l = self.config, self.module.config.clip_l
        widths = {"clip_l": clip_l.width} if clip_l else {}
        widths["big_g"] = self.module.config.big_g.width
        outputs = [*widths, "pooled"]
        columns = 1 if config.text_dropout_mode == "joint" else len(outputs)
        draws = each(random, lambda g: torch.rand(1, columns, generator=g))
        rates = torch.tensor([config.dropout.get(name, config.text_dropout) for name in outputs])
        keep = (draws >= rates).to(text.pooled)
        parts = torch.split(text.crossattn, list(widths.values()), dim=-1)
        crossattn = torch.cat([part * keep[:, i, None, None] for i, part in enumerate(parts)], dim=-1)
        return TextFeatures(crossattn, text.pooled * keep[:, -1:])

    def _without_some(self, vector: Tensor, random: Streams) -> Tensor:
        """Zero the features of whole micro-conditions at random: they are embedders with a ucg_rate, too."""
        config, model = self.config, self.module.config
        if not any(config.dropout.get(name) for name in model.scalars):
            return vector
        rates = torch.tensor([config.dropout.get(name, 0.0) for name in model.scalars])
        keep = (each(random, lambda g: torch.rand(1, len(rates), generator=g)) >= rates).to(vector)
        widths = [model.scalar_dim * SCALAR_COUNT[name] for name in model.scalars]
        mask = keep.repeat_interleave(torch.tensor(widths, device=vector.device), dim=1)
        return torch.cat([vector[:, : -mask.shape[1]], vector[:, -mask.shape[1] :] * mask], dim=1)


def micro_conditions(batch: Batch) -> list[MicroConditioning]:
    """What each picture of a batch is conditioned on."""
    columns = zip(
        batch.original_size, batch.crop_top_left, batch.target_size, batch.aesthetic_score, strict=True
    )
    return [
        MicroConditioning(original_size=size, crop_top_left=crop, target_size=target, aesthetic_score=score)
        for size, crop, target, score in columns
    ]
