"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sdxl_cli.training.config import OptimizerConfig

NO_DECAY_DIMS = 1
"""Biases and norms, which have one dimension, are not decayed."""


def build_adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with torch's fused step."""
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim > NO_DECAY_DIMS], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= NO_DECAY_DIMS], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The rate of step 0 … max_steps - 1: linear warm-up, constant, linear decay."""
    rate = config.learning_rate
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    if config.decay_steps and step >= max_steps - config.decay_steps:
        rate *= (max_steps - step) / config.decay_steps
    return rate
