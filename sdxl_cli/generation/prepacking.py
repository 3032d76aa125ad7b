"""Whether a U-Net's linear layers are laid out anew for the processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from sdxl_kernels.prepacked import prepacking_exists, prepacking_pays
from sdxl_kernels.processor import cpu_multiplies_bf16

from sdxl_cli.checkpoint.meminfo import MEMINFO, total_memory
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.request import Prepack

SHARE = 0.5
"""Of a computer's memory, which the copies may take by themselves. Unlike a file's pages they cannot be dropped."""


def prepacks(
    asked: Prepack,
    unet_bytes: Callable[[], int],
    device: torch.device,
    dtype: torch.dtype,
    meminfo: Path = MEMINFO,
) -> bool:
    """Whether to, for a U-Net of so many bytes.

    ``auto`` goes by the processor and by how much memory there is, not by how much is free: the same command computes
    the same bits every time.

    Raises:
        UsageError: ``on`` where it cannot be done.
    """
    if asked == "off":
        return False
    if asked == "on":
        _require(device, dtype)
        return True
    total = total_memory(meminfo)
    if device.type != "cpu" or total is None or not prepacking_pays(dtype):
        return False
    return unet_bytes() <= SHARE * total


def _require(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cpu":
        raise UsageError(f"--prepack on: is for CPUs, and this runs on {device.type}; leave it out")
    if not prepacking_exists():
        raise UsageError("--prepack on: this build of torch has no oneDNN; leave it out")
    if dtype == torch.bfloat16 and not cpu_multiplies_bf16():
        raise UsageError(
            "--prepack on: this processor has no bf16 instructions; use --dtype fp32 or leave it out"
        )
