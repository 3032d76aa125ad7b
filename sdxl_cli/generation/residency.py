"""Which weights are in memory when: what may stay loaded, and what a device has free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.checkpoint.meminfo import MEMINFO, available_memory
from sdxl_cli.generation.memory import part_bytes
from sdxl_cli.generation.request import Vram
from sdxl_cli.generation.streaming import streamed_bytes
from sdxl_cli.model.config import Part

SMALL = 2 << 30
"""Bytes of weights that may always stay in a computer's own memory."""
_SPARE = 0.9
"""Share of the free memory that weights may take; the rest is for what is computed with them."""
_MEANING: dict[Vram, str] = {
    "high": "everything stays loaded",
    "med": "one part at a time is loaded",
    "low": "one part at a time is loaded, of the U-Net one block",
}
_NAMES: dict[Part, str] = {"text": "text encoders", "unet": "U-Net", "vae": "autoencoder"}


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of making a picture, and the weights that are loaded during it."""

    name: str
    bytes: int


def choose(
    asked: Vram,
    models: Sequence[ModelFiles],
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> Vram:
    """How much may stay loaded.

    ``auto`` is ``high`` where all weights take at most half of what an accelerator has free, or 2 GB of a
    computer's own memory; else ``med``, unless the largest part does not fit by itself: then it is ``low``.
    """
    if asked != "auto":
        return asked
    parts = [part_bytes(files, dtype, vae_dtype) for files in models]
    total, largest = sum(sum(sizes.values()) for sizes in parts), max(max(s.values()) for s in parts)
    free = free_bytes(device)
    if total <= (free // 2 if device.type == "cuda" and free is not None else SMALL):
        return "high"
    return "low" if free is not None and largest > _SPARE * free else "med"


def stages(
    vram: Vram, models: Mapping[str, ModelFiles], dtype: torch.dtype, vae_dtype: torch.dtype
) -> list[Stage]:
    """Which weights are loaded during which stage, in order; ``models`` by role: ``base``, ``refiner``."""
    sizes = {role: part_bytes(files, dtype, vae_dtype) for role, files in models.items()}
    everything = sum(sum(parts.values()) for parts in sizes.values())
    order: list[tuple[Part, Sequence[str]]] = [
        ("text", list(models)),
        ("unet", list(models)),
        ("vae", list(models)[:1]),
    ]
    found = []
    for part, roles in order:
        for role in roles:
            loaded = sizes[role][part]
            if vram == "low" and part == "unet":
                loaded = streamed_bytes(models[role].config.unet, dtype)
            found.append(Stage(f"{role} {_NAMES[part]}", everything if vram == "high" else loaded))
    return found


def describe(vram: Vram, models: Mapping[str, ModelFiles], dtype: torch.dtype, vae_dtype: torch.dtype) -> str:
    """One line: ``--vram med, one part at a time is loaded: base text encoders 1.6 GB, …``."""
    table = stages(vram, models, dtype, vae_dtype)
    if vram == "high":
        return f"--vram high, {_MEANING[vram]}: {format_bytes(table[0].bytes)} of weights"
    rows = ", ".join(f"{stage.name} {format_bytes(stage.bytes)}" for stage in table)
    return f"--vram {vram}, {_MEANING[vram]}: {rows}"


def free_bytes(device: torch.device, meminfo: Path = MEMINFO) -> int | None:
    """What is free on a device, with what torch keeps there unused; of a computer's own memory what Linux says.

    None where nobody says.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return available_memory(meminfo)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no type of its own for the CPU's allocator and for Metal's
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
