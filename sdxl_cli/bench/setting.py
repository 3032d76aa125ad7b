"""What is to be timed: model, size, precision, device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from sdxl_cli.bench import weights as sources
from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.errors import UsageError, unknown
from sdxl_cli.generation import residency
from sdxl_cli.generation.device import compute_as_told, pick_device, pick_dtype, pick_vae_dtype
from sdxl_cli.generation.pipeline import Reporter
from sdxl_cli.generation.plan import Plan, plan_generation
from sdxl_cli.generation.prepacking import prepacks
from sdxl_cli.generation.request import GenerateRequest, Precision, Prepack
from sdxl_cli.generation.session import open_weights
from sdxl_cli.generation.weights import FileWeights
from sdxl_cli.model.config import CONFIGS

T = TypeVar("T")
CaseName = Literal["text", "unet", "decode", "encode", "image", "train"]
PROMPT = "a photograph of an astronaut riding a horse"
NEGATIVE = "blurry, low quality"
_ALSO = {"bundled": "tiny"}
"""Names of models that are names of sizes too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """What the user asked for."""

    model: str | None = None
    """As for ``sdxl generate``; with random weights the name of a size."""
    random_weights: bool = False
    """Numbers instead of a file: as fast as the real ones, and no download."""
    size: str | None = None
    """``WxH``; None: the square the model was trained on."""
    batch: int = 1
    """Pictures at once."""
    steps: int = 30
    """Of a whole picture."""
    negative: bool = False
    """With a negative prompt. Without one, the base's features for it are zeros, which are cheaper."""
    device: str = "auto"
    dtype: Precision = "auto"
    vae_dtype: Precision = "auto"
    winograd: bool = True
    prepack: Prepack = "auto"
    only: tuple[CaseName, ...] = ()
    """Which rows; empty: all that fit."""
    repeats: int = 5
    """Runs of each row, after one that is not timed."""
    budget: float = 60.0
    """Seconds of a row from which on it is not run again."""
    threads: int | None = None
    """Of a CPU; None: what torch takes."""

    def __post_init__(self) -> None:
        for flag in ("batch", "steps", "repeats"):
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag} {getattr(self, flag)}: at least 1 is needed")
        if self.budget <= 0:
            raise UsageError(f"--budget {self.budget:g}: expected seconds, more than 0")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: at least 1 is needed")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The request with everything settled."""

    request: BenchRequest
    files: ModelFiles
    weights: FileWeights
    plan: Plan

    @property
    def asked(self) -> GenerateRequest:
        """What is generated."""
        assert isinstance(self.plan.request, GenerateRequest)
        return self.plan.request

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.plan.framing.size

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[B, z, h, w]."""
        vae = self.files.config.vae
        height, width = (side // vae.downsampling for side in self.size)
        return self.request.batch, vae.z_channels, height, width


class Silent:
    """Hears everything and says nothing."""

    def note(self, text: str) -> None:
        """See :class:`~sdxl_cli.generation.pipeline.Reporter`."""

    def warn(self, text: str) -> None:
        """See :class:`~sdxl_cli.generation.pipeline.Reporter`."""

    def progress(self, items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
        """See :class:`~sdxl_cli.generation.pipeline.Reporter`."""
        yield from items


def settle(request: BenchRequest, report: Reporter) -> Setting:
    """Find the model, the device and the size. No weights are read yet.

    Raises:
        UsageError: a size, device or precision that cannot be, or an unknown name.
        FileError, NetworkError: see :func:`~sdxl_cli.checkpoint.locate.locate`.
    """
    files = _random(request) if request.random_weights else locate(request.model, "model")
    report.note(files.identity.label if request.random_weights else files.describe())
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    generate = GenerateRequest(
        prompt=PROMPT,
        negative_prompt=NEGATIVE if request.negative else "",
        size=request.size,
        steps=request.steps,
        num_images=request.batch,
        batch_size=request.batch,
        seed=0,
        device=request.device,
        dtype=request.dtype,
        vae_dtype=request.vae_dtype,
        winograd=request.winograd,
        prepack=request.prepack,
    )
    plan = plan_generation(generate, files.config, formulation=None)
    return Setting(request=request, files=files, weights=_weights(files, generate, report), plan=plan)


def _random(request: BenchRequest) -> ModelFiles:
    name = request.model or "base"
    name = _ALSO.get(name, name)
    if name not in CONFIGS:
        raise unknown("size for --random-weights", name, CONFIGS)
    return sources.random_files(name, CONFIGS[name])


def _weights(files: ModelFiles, request: GenerateRequest, report: Reporter) -> FileWeights:
    if files.components:
        return open_weights([files], request, report)[0]
    device = pick_device(request.device)
    dtype, vae_dtype = pick_dtype(request.dtype, device), pick_vae_dtype(request.vae_dtype, device)
    compute_as_told(dtype, vae_dtype)
    free = residency.free_bytes(device)
    sizes = sources.weight_bytes(files.config, dtype, vae_dtype)
    held = sum(sizes.values())
    # as at most 0.7 of what is free: the work needs room, too
    stays = free is None or held < 0.7 * free
    random = sources.RandomWeights(
        replace(files),
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
        stays=stays,
        winograd=request.winograd,
        prepacks=prepacks(request.prepack, lambda: sizes["unet"], device, dtype),
    )
    report.note(f"runs on {device.type} in {str(dtype).removeprefix('torch.')}")
    return random


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, fp32 on the CPU; the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
