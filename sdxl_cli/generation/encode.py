"""Prompts to what the U-Net is conditioned on, for the picture wanted and for what it is guided away from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdxl_cli.diffusion.denoiser import Denoiser, Network
from sdxl_cli.diffusion.guidance import Emphasis, Guided
from sdxl_cli.generation.checks import require_finite
from sdxl_cli.generation.guidance_texts import parse_emphasis
from sdxl_cli.generation.guiding import settle
from sdxl_cli.generation.remember import Remembering
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

    Without a negative prompt the base gets zeros, features and pooled, as the original does, unless the empty text
    is asked for; a refiner's is always encoded, the empty one too (facts.md section 4).

    Raises:
        UsageError: the encoders have not the layer asked for.
        FileError: a learned embedding that is mentioned is for another model.
        NumericError: a feature is not finite.
    """
    reader = request.reader()
    require_readable(request.texts(), reader, weights.config)
    encoders = weights.text()
    positive = encode_text(encoders, request.prompt, request.prompt_2, weights.device, reader)
    texts = (request.negative_prompt, request.negative_prompt_2)
    if any(texts) or weights.config.is_refiner or request.empty_negative == "encode":
        negative = encode_text(encoders, texts[0] or "", texts[1], weights.device, reader)
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
    sigmas: Tensor,
    batch: int,
    seen: Tensor | None = None,
    levels: Sequence[float] = (),
) -> Guided:
    """The guided denoiser of ``batch`` pictures: the U-Net with both prompts and all micro-conditions.

    ``sigmas`` [n + 1] are the noise levels of the whole run, which a schedule of the guidance goes along;
    ``seen`` [batch, 5, h, w] is what an inpainting U-Net reads beside the latents. What the network can know before
    it looks at one of ``levels`` is computed here; of others when it does.
    """
    schedule = weights.formulation.schedule()
    sides = micro_conditions(framing, request)
    emphasis = None
    if request.adm_scale is not None:
        early = parse_emphasis(request.adm_scale)
        scaled = (_scaled(sides[0], early.positive), _scaled(sides[1], early.negative))
        emphasis = Emphasis(_vectors(weights, prompts, scaled, batch), early.above(schedule))
    unet = Remembering(weights.unet(), weights.recorded)
    found = Guided(
        denoiser=Denoiser(_network(unet, weights, seen), schedule, weights.formulation.prediction),
        crossattn=(
            _repeat(prompts.negative.crossattn, batch),
            _repeat(prompts.positive.crossattn, batch),
        ),
        vector=_vectors(weights, prompts, sides, batch),
        guidance=settle(request, schedule, sigmas),
        emphasis=emphasis,
    )
    for crossattn, vector, indices in found.needs(levels):
        unet.expect(crossattn, vector, indices)
    return found


def _vectors(
    weights: Weights, prompts: Prompts, sides: tuple[MicroConditioning, MicroConditioning], batch: int
) -> tuple[Tensor, Tensor]:
    """Of the negative and of the positive side, [B, adm]; ``sides`` are positive and negative."""
    positive, negative = sides
    return (
        _repeat(conditioning_vector(weights.config, prompts.negative.pooled, [negative]), batch),
        _repeat(conditioning_vector(weights.config, prompts.positive.pooled, [positive]), batch),
    )


def _scaled(micro: MicroConditioning, factor: float) -> MicroConditioning:
    """The same with another original size, in whole pixels (Fooocus modules/patch.py)."""
    height, width = micro.original_size
    return replace(micro, original_size=(int(height * factor), int(width * factor)))


def _network(unet: Remembering, weights: Weights, seen: Tensor | None) -> Network:
    """The U-Net as the denoiser calls it: with latents alone."""
    if seen is None or weights.config.unet.in_channels == weights.config.vae.z_channels:
        return unet
    beside = seen

    def inpainting(x: Tensor, index: int, crossattn: Tensor, vector: Tensor) -> Tensor:
        return unet(torch.cat([x, beside.to(x)], dim=1), index, crossattn, vector)

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
