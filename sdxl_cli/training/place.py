"""Where a training run computes, and in what."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sdxl_cli.generation.device import pick_device
from sdxl_cli.training.config import LoopConfig


def training_device(config: LoopConfig) -> torch.device:
    """The device that the configuration names.

    Raises:
        UsageError: there is none of that name.
    """
    return pick_device(config.device)


def compute_dtype(config: LoopConfig, device: torch.device) -> torch.dtype:
    """bf16 or fp32; by itself bf16 only on CUDA devices that have it."""
    if config.dtype == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def computing(config: LoopConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass: weights stay fp32; with bf16, torch casts where that is safe."""
    dtype = compute_dtype(config, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
