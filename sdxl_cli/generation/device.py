"""Where the networks run, and in which precision: decided here and nowhere else."""

from __future__ import annotations

import re

import torch
from sdxl_kernels.processor import cpu_has_bf16

from sdxl_cli.errors import UsageError, unknown
from sdxl_cli.generation.request import Precision

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KINDS = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` to a device that is there.

    Raises:
        UsageError: an unknown name, or a device this machine does not have.
    """
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", name.strip().lower())
    if not match or match[1] not in _KINDS or (match[2] and match[1] != "cuda"):
        raise unknown("device", name, [*_KINDS, "cuda:0"])
    kind, index = match[1], int(match[2] or 0)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {name}: torch sees no Apple GPU; use --device cpu")
    return torch.device("cuda", index) if kind == "cuda" else torch.device(kind)


def pick_dtype(name: Precision, device: torch.device) -> torch.dtype:
    """The precision of the U-Net and the text encoders.

    ``auto`` is bf16 where the device computes in it, fp16 on older CUDA cards, and otherwise fp32: a CPU without
    bf16 instructions is about fifty times slower with it.

    Raises:
        UsageError: fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise UsageError(
            "--dtype fp16: CPUs do not compute in it, it would be slower than fp32 and overflow; use --dtype auto"
        )
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def pick_vae_dtype(name: Precision, device: torch.device) -> torch.dtype:
    """The precision of the autoencoder: fp32 unless asked, as the original runs it; on a GPU bf16 where it has that.

    The released one overflows in fp16, which is therefore never chosen by itself.

    Raises:
        UsageError: fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise UsageError("--vae-dtype fp16: CPUs do not compute in it; use --vae-dtype fp32")
    if name != "auto":
        return DTYPES[name]
    quick = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if quick else torch.float32


def compute_as_told(*dtypes: torch.dtype) -> None:
    """Have fp32 on a GPU computed in fp32: cuDNN's convolutions otherwise round what they multiply to 10 bits."""
    if torch.float32 in dtypes:
        torch.backends.cudnn.allow_tf32 = False


def describe(device: torch.device) -> str:
    """What a picture remembers of the device: its kind, and a GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
