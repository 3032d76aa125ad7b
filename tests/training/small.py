"""Sizes smaller than the bundled model's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sdxl_cli.model.config import ModelConfig, TextTowerConfig, UNetConfig, VAEConfig
from sdxl_cli.training.config import LoopConfig, OptimizerConfig, UNetTrainConfig
from sdxl_cli.training.vae_config import VAETrainConfig

SMALL = ModelConfig(
    unet=UNetConfig(
        model_channels=16,
        num_res_blocks=1,
        transformer_depth=(0, 1, 1),
        transformer_depth_middle=1,
        num_head_channels=8,
        context_dim=40,
        adm_in_channels=24 + 6 * 32,
        norm_groups=4,
    ),
    vae=VAEConfig(channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=2),
    clip_l=TextTowerConfig(width=16, layers=2, heads=2, activation="quick_gelu", embed_dim=16),
    big_g=TextTowerConfig(width=24, layers=2, heads=3, activation="gelu", embed_dim=24),
    scalars=("original_size", "crop_top_left", "target_size"),
    scalar_dim=32,
    native_size=64,
)
SMALL_REFINER = replace(
    SMALL,
    unet=replace(SMALL.unet, context_dim=24, adm_in_channels=24 + 5 * 32),
    clip_l=None,
    scalars=("original_size", "crop_top_left", "aesthetic_score"),
)


def loop_config(**changes: Any) -> LoopConfig:
    values: dict[str, Any] = {
        "max_steps": 6,
        "batch_size": 2,
        "save_every": 100,
        "log_every": 2,
        "ema_decay": 0.9,
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2, decay_steps=2),
    }
    return LoopConfig(**values | changes)


def unet_config(**changes: Any) -> UNetTrainConfig:
    """Changes to ``loop`` go by their own names."""
    loop = {name: changes.pop(name) for name in list(changes) if name in LoopConfig.__slots__}
    values: dict[str, Any] = {
        "model": "small",
        "noise_offset": 0.05,
        "min_snr_gamma": 5.0,
        "text_dropout": 0.2,
        "train_text_encoders": True,
        "memory": "none",  # nothing to count, many times
        "loop": loop_config(**loop),
    }
    return UNetTrainConfig(**values | changes)


def vae_config(**changes: Any) -> VAETrainConfig:
    """Changes to ``loop`` go by their own names."""
    loop = {name: changes.pop(name) for name in list(changes) if name in LoopConfig.__slots__}
    values: dict[str, Any] = {
        "model": "small",
        "crop_sizes": (32, 40),
        "crop_weights": (0.5, 0.5),
        "pixels_per_step": 2048,
        "sample_images": 0,
        "loop": loop_config(**loop),
    }
    return VAETrainConfig(**values | changes)
