"""Where a training run computes, and in what."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.device import pick_device
from sdxl_cli.training.config import LoopConfig, UNetTrainConfig
from sdxl_cli.training.meta_autocast import MetaAutocast

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


def hold(model: nn.Module, config: UNetTrainConfig, device: torch.device) -> None:
    """Keep weights in the precision that the configuration says; norms and biases of frozen networks stay fp32.

    Args:
        model: changed in place, wherever it is.
        config: says ``weight_dtype``, and ``frozen_dtype`` of what is not trained.
        device: where it is to be trained.

    Raises:
        UsageError: it is one that is not computed in.
    """
    if config.weight_dtype == "bf16":
        model.to(torch.bfloat16)
        return
    computed = compute_dtype(config.loop, device)
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
    if dtype == torch.float32:
        return nullcontext()
    return MetaAutocast(dtype) if device.type == "meta" else torch.autocast(device.type, dtype)
