"""Prompts to what the U-Net is conditioned on, for the picture wanted and for what it is guided away from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_cli.diffusion.denoiser import Denoiser, Network
from sdxl_cli.diffusion.guidance import Guided
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.generation.checks import require_finite
from sdxl_cli.generation.request import Framing, SamplingRequest
from sdxl_cli.generation.text_features import encode_text, of_one_length, require_readable
from sdxl_cli.generation.weights import Weights
from sdxl_cli.model.conditioning import (
    MicroConditioning,
    TextFeatures,
    conditioning_vector,
)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The features of both prompts, of one picture [1, ...]."""

    positive: TextFeatures
    negative: TextFeatures


def encode_prompts(request: SamplingRequest, weights: Weights) -> Prompts:
    """Run the text encoders over the prompt and the negative prompt.

    Without a negative prompt the base gets zeros, features and pooled, as the original does; a refiner's is always
    encoded, the empty one too (facts.md section 4).

    Raises:
        UsageError: the encoders have not the layer asked for.
        FileError: a learned embedding that is mentioned is for another model.
        NumericError: a feature is not finite.
    """
    reader = request.reader()
    require_readable(request.texts(), reader, weights.config)
    encoders = weights.text()
    positive = encode_text(encoders, request.prompt, request.prompt_2, weights.device, reader)
    if request.negative_prompt or weights.config.is_refiner:
        negative = encode_text(encoders, request.negative_prompt or "", None, weights.device, reader)
    else:
        negative = positive.zeros()
    for features in (positive, negative):
        for values in (features.crossattn, features.pooled):
            require_finite(values, "the text encoders", weights.dtype, "--dtype")
    return Prompts(*of_one_length(positive, negative))


def guided(
    weights: Weights,
    prompts: Prompts,
    framing: Framing,
    request: SamplingRequest,
    schedule: NoiseSchedule,
    batch: int,
    seen: Tensor | None = None,
) -> Guided:
    """The guided denoiser of ``batch`` pictures: the U-Net with both prompts and all micro-conditions.

    ``seen`` [batch, 5, h, w] is what an inpainting U-Net reads beside the latents.
    """
    positive, negative = micro_conditions(framing, request)
    sides = ((prompts.negative, negative), (prompts.positive, positive))
    crossattn = tuple(_repeat(text.crossattn, batch) for text, _ in sides)
    vectors = tuple(
        _repeat(conditioning_vector(weights.config, text.pooled, [m]), batch) for text, m in sides
    )
    return Guided(
        denoiser=Denoiser(_network(weights, seen), schedule, weights.prediction),
        crossattn=(crossattn[0], crossattn[1]),
        vector=(vectors[0], vectors[1]),
        cfg_scale=request.cfg_scale,
    )


def _network(weights: Weights, seen: Tensor | None) -> Network:
    """The U-Net as the denoiser calls it: with latents alone."""
    unet = weights.unet()
    if seen is None or weights.config.unet.in_channels == weights.config.vae.z_channels:
        return unet
    beside = seen

    def inpainting(x: Tensor, indices: Tensor, crossattn: Tensor, vector: Tensor) -> Tensor:
        # guidance asks for several sides of the same pictures at once
        rest = beside.to(x).repeat(len(x) // len(beside), 1, 1, 1)
        return unet(torch.cat([x, rest], dim=1), indices, crossattn, vector)

    return inpainting


def micro_conditions(
    framing: Framing, request: SamplingRequest
) -> tuple[MicroConditioning, MicroConditioning]:
    """What the model is told about the sizes, for the prompt and for the negative prompt."""
    positive = MicroConditioning(
        original_size=framing.original_size,
        crop_top_left=framing.crop_top_left,
        target_size=framing.target_size,
        aesthetic_score=request.aesthetic_score,
    )
    negative = MicroConditioning(
        original_size=framing.negative_original_size,
        crop_top_left=framing.negative_crop_top_left,
        target_size=framing.negative_target_size,
        aesthetic_score=request.negative_aesthetic_score,
    )
    return positive, negative


def _repeat(features: Tensor, batch: int) -> Tensor:
    return features.expand(batch, *features.shape[1:])
