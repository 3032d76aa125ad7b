"""Sinusoidal features of a number: of the timestep, and of every micro-condition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_PERIOD = 10_000.0


def sinusoidal(values: Tensor, dim: int) -> Tensor:
    """[cos | sin] features with frequencies 10000^(-j / half), j = 0 … half-1 (facts: sgm timestep_embedding).

    Args:
        values: [N] numbers: integer timesteps, pixels, or scores.
        dim: even number of features.

    Returns:
        float32 [N, dim].
    """
    half = dim // 2
    # in this order, as the original rounds: another one turns the angle of 2000 pixels by 1e-4
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * exponents.exp()[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
