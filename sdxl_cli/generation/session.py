"""From files to models that are ready to make pictures: device, precision, and what stays loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.errors import UsageError
from sdxl_cli.generation import residency
from sdxl_cli.generation.allocator import reuse_large_blocks
from sdxl_cli.generation.device import compute_as_told, describe, pick_device, pick_dtype, pick_vae_dtype
from sdxl_cli.generation.lora import wear_loras
from sdxl_cli.generation.memory import part_bytes
from sdxl_cli.generation.metadata import Stored
from sdxl_cli.generation.picture import Pixels, read_texts
from sdxl_cli.generation.pipeline import Models, Reporter
from sdxl_cli.generation.prepacking import prepacks
from sdxl_cli.generation.request import GenerateRequest, SamplingRequest
from sdxl_cli.generation.sizes import format_size
from sdxl_cli.generation.weights import FileWeights


def open_weights(
    models: Sequence[ModelFiles], request: SamplingRequest, report: Reporter
) -> list[FileWeights]:
    """Decide where and how the models run, and put the LoRAs on them. Nothing is loaded yet.

    Raises:
        FileError: a LoRA that is missing, damaged or for another architecture.
        UsageError: a device this machine does not have, or a precision it does not compute in.
    """
    device = pick_device(request.device)
    dtype, vae_dtype = pick_dtype(request.dtype, device), pick_vae_dtype(request.vae_dtype, device)
    compute_as_told(dtype, vae_dtype)
    if device.type == "cpu":
        reuse_large_blocks()
    vram = residency.choose(request.vram, models, device, dtype, vae_dtype)
    report.note(f"runs on {describe(device)} in {str(dtype).removeprefix('torch.')}")
    roles = dict(zip(("base", "refiner"), models, strict=False))
    report.note(residency.describe(vram, roles, dtype, vae_dtype))
    weights = [
        FileWeights(
            files,
            device=device,
            dtype=dtype,
            vae_dtype=vae_dtype,
            stays=vram == "high",
            streams=vram == "low",
            winograd=request.winograd,
            prepacks=prepacks(request.prepack, partial(_unet_bytes, files, dtype), device, dtype),
            cuda_graphs=request.cuda_graphs,
            compiles=request.compile,
            report=report,
        )
        for files in models
    ]
    wear_loras(weights, request, report)
    return weights


def _unet_bytes(files: ModelFiles, dtype: torch.dtype) -> int:
    return part_bytes(files, dtype, dtype)["unet"]


def warn_of_another_model(stored: Stored, files: ModelFiles, report: Reporter) -> None:
    """Say when a picture that is made again was made with another model: it will not be the same."""
    before = stored.models.get("base")
    # other programs write the first ten digits only
    if before is not None and before.sha256 and not files.sha256.startswith(before.sha256.lower()):
        report.warn(
            f"the picture was made with {before.name} [{before.short_hash}], this is {files.name} "
            f"[{files.short_hash}]; it will look different"
        )


def warn_of_other_loras(stored: Stored, models: Models, report: Reporter) -> None:
    """Say when a LoRA of that name was another file when the picture was made."""
    before = {lora["name"]: lora["sha256"] for lora in stored.raw.get("loras", ())}
    refined = models.refiner.loras if models.refiner else ()
    for worn in (*models.base.loras, *refined):
        lora = worn.fitted.lora
        if before.get(lora.name, lora.sha256) != lora.sha256:
            report.warn(
                f"the picture was made with another file named {lora.name} [{before[lora.name][:10]}]; this one, "
                f"{lora.path}, is [{lora.sha256[:10]}]: it will look different"
            )


def fit_to_model(pixels: Pixels, multiple: int, name: str, report: Reporter) -> Pixels:
    """Cut a picture [H, W, 3] evenly on both sides until its sides are multiples of ``multiple``.

    Args:
        pixels: the picture.
        multiple: what the model needs.
        name: the picture's, for what is said.
        report: is told when something is cut off.

    Raises:
        UsageError: a side is shorter than ``multiple``.
    """
    height, width = pixels.shape[:2]
    keep = (height - height % multiple, width - width % multiple)
    if 0 in keep:
        raise UsageError(f"{name}: is {width}x{height}; this model needs at least {multiple} pixels per side")
    if keep != (height, width):
        report.note(
            f"{name}: cut from {width}x{height} to {format_size(keep)}; sides must be multiples of {multiple}"
        )
    top, left = (height - keep[0]) // 2, (width - keep[1]) // 2
    return np.ascontiguousarray(pixels[top : top + keep[0], left : left + keep[1]])


def source_of(request: SamplingRequest) -> dict[str, Any] | None:
    """What a picture remembers of the pictures it was made from; None when it was made from noise alone."""
    if not isinstance(request, GenerateRequest) or request.init_img is None:
        return None
    source = source_record(Path(request.init_img).expanduser())
    if request.mask is not None:
        mask = Path(request.mask).expanduser()
        source["mask"] = {"name": mask.name, "sha256": hashlib.sha256(mask.read_bytes()).hexdigest()}
    return source


def source_record(path: Path) -> dict[str, Any]:
    """What a refined picture remembers of the picture it was made from: name, hash, and what that one said."""
    texts = read_texts(path)
    source: dict[str, Any] = {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if texts.record:
        source["sdxl"] = json.loads(texts.record)
    elif texts.parameters:
        source["parameters"] = texts.parameters
    return source
