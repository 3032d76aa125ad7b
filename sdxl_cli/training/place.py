"""Where a training run computes, and in what."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.device import pick_device
from sdxl_cli.training.config import LoopConfig, UNetTrainConfig

SAVE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Precisions of files."""


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


def hold_frozen(model: nn.Module, config: UNetTrainConfig) -> None:
    """Keep what is not trained in the precision that the configuration says; norms and biases stay fp32.

    Raises:
        UsageError: it is one that is not computed in.
    """
    computed = compute_dtype(config.loop, next(model.parameters()).device)
    if config.frozen_dtype == "bf16" and computed != torch.bfloat16:
        raise UsageError('frozen_dtype = "bf16" needs --dtype bf16: in fp32 every step would convert them')
    if config.frozen_dtype == "fp32" or computed == torch.float32:
        return
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.ndim > 1:
            parameter.data = parameter.data.to(computed)


def computing(config: LoopConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass: weights stay fp32; with bf16, torch casts where that is safe."""
    dtype = compute_dtype(config, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
