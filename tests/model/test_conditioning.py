"""Micro-conditions become the numbers, and the features, that diffusers makes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.embeddings import Timesteps, get_timestep_embedding

from sdxl_cli.model.conditioning import (
    Conditioner,
    MicroConditioning,
    TextFeatures,
    condition,
    conditioning_vector,
)
from sdxl_cli.model.config import BASE, REFINER, ModelConfig
from sdxl_cli.model.embedding import sinusoidal

MICRO = [
    MicroConditioning(original_size=(768, 1344), crop_top_left=(0, 96), target_size=(1024, 512)),
    MicroConditioning(original_size=(333, 4000), crop_top_left=(17, 0), target_size=(1216, 832)),
    MicroConditioning(original_size=(64, 65), target_size=(1024, 1024), aesthetic_score=2.5),
]


def pipelines_time_ids(config: ModelConfig, micro: MicroConditioning) -> torch.Tensor:
    """The numbers as diffusers' own pipelines put them together, base and refiner."""
    width = config.unet.adm_in_channels
    network = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=256),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=width)),
    )
    pipeline: Any = SimpleNamespace(
        unet=network, config=SimpleNamespace(requires_aesthetics_score=config.is_refiner)
    )
    sizes = (micro.original_size, micro.crop_top_left, micro.target_size)
    if not config.is_refiner:
        make = diffusers.StableDiffusionXLPipeline._get_add_time_ids
        return make(pipeline, *sizes, torch.float32, text_encoder_projection_dim=1280)
    ids, _ = diffusers.StableDiffusionXLImg2ImgPipeline._get_add_time_ids(
        pipeline, *sizes, micro.aesthetic_score, 2.5, *sizes, torch.float32, text_encoder_projection_dim=1280
    )
    return ids


@pytest.mark.parametrize(("config", "width"), [(BASE, 2816), (REFINER, 2560)], ids=["base", "refiner"])
def test_the_vector_is_diffusers_vector(config: ModelConfig, width: int) -> None:
    pooled = torch.randn(len(MICRO), 1280)
    ids = torch.cat([pipelines_time_ids(config, micro) for micro in MICRO])
    features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(ids.flatten())
    expected = torch.cat([pooled, features.reshape(len(MICRO), -1)], dim=-1)
    ours = conditioning_vector(config, pooled, MICRO)
    assert ours.shape == (len(MICRO), width)
    assert torch.equal(ours, expected)


def test_every_pair_is_height_then_width() -> None:
    """Each exchange alone changes the vector, and nothing but its own features."""
    pooled = torch.zeros(1, 1280)
    honest = conditioning_vector(BASE, pooled, MICRO[:1])
    for start, name in ((0, "original_size"), (2, "crop_top_left"), (4, "target_size")):
        values = {
            field: getattr(MICRO[0], field) for field in ("original_size", "crop_top_left", "target_size")
        }
        values[name] = values[name][::-1]
        swapped = conditioning_vector(BASE, pooled, [MicroConditioning(**values)])
        changed = (swapped != honest)[0, 1280:].view(6, 256).any(dim=1).tolist()
        assert changed == [start <= index < start + 2 for index in range(6)]


@pytest.mark.parametrize("dim", [32, 256, 320, 384])
def test_sinusoids_are_the_bits_of_diffusers(dim: int) -> None:
    """Of timesteps, pixels and scores; cosines first, half the features each."""
    values = torch.cat([torch.arange(4097).float(), torch.tensor([2.5, 6.0, 6.5])])
    expected = get_timestep_embedding(values, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(sinusoidal(values, dim), expected)
    assert torch.equal(sinusoidal(torch.arange(1000), dim), expected[:1000])


def test_sinusoids_are_as_written_in_the_paper() -> None:
    """In double precision; single turns the fastest angle of 4096 by at most its rounding."""
    values = torch.arange(0, 4097, 13)
    frequencies = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = values[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1)
    assert (sinusoidal(values, 256) - expected).abs().max() < 4096 * 2**-22
    assert torch.equal(sinusoidal(torch.zeros(1), 6), torch.tensor([[1.0, 1, 1, 0, 0, 0]]))


def test_features_keep_single_precision_until_the_last_cast() -> None:
    """4000 pixels in half precision would be a multiple of 2, in bfloat16 of 16."""
    pooled = torch.zeros(len(MICRO), 1280)
    exact = conditioning_vector(BASE, pooled, MICRO)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(conditioning_vector(BASE, pooled.to(dtype), MICRO), exact.to(dtype))


def test_text_and_sizes_become_what_the_unet_reads() -> None:
    text = TextFeatures(torch.randn(3, 77, 2048), torch.randn(3, 1280))
    both = condition(BASE, text, MICRO)
    assert (both.crossattn.shape, both.vector.shape) == ((3, 77, 2048), (3, 2816))
    assert torch.equal(both.crossattn, text.crossattn)


@pytest.mark.parametrize(("config", "width"), [(BASE, 2048), (REFINER, 1280)], ids=["base", "refiner"])
def test_the_released_encoders_give_the_released_widths(config: ModelConfig, width: int) -> None:
    with torch.device("meta"):
        conditioner = Conditioner(config)
        ids = torch.zeros(2, 77, dtype=torch.long)
    big_g = conditioner.embedders[-1]
    # shapes only: the mask is the one tensor that is not on the meta device
    big_g.model.attn_mask = big_g.model.attn_mask.to("meta")
    with torch.no_grad():
        penultimate, pooled = big_g(ids)
        widths = [penultimate.shape[-1]]
        if config.clip_l:
            widths.append(conditioner.embedders[0](ids).shape[-1])
    assert (pooled.shape, penultimate.shape[:2], sum(widths)) == ((2, 1280), (2, 77), width)
