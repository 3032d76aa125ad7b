"""Models to be timed: read from files, or of random numbers, which take as long as any others."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.identify import Identity, Kind
from sdxl_cli.checkpoint.read import load_model
from sdxl_cli.generation.weights import FileWeights
from sdxl_cli.model.blank import blank
from sdxl_cli.model.config import ALL_PARTS, ModelConfig, Part
from sdxl_cli.model.sdxl import SDXL

SMALL = 0.02
"""Deviation of biases, and of a norm's scales around 1."""


def random_tensor(name: str, shape: Collection[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A parameter that keeps what goes through it about as large as it was; the same for the same name and shape.

    Matrices and kernels have the variance 1 / inputs; scales of norms are about 1, biases about 0.
    """
    size = tuple(shape)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    numbers = torch.randn(size, generator=generator, device=device)
    if len(size) > 1:
        numbers *= math.prod(size[1:]) ** -0.5
    else:
        numbers = numbers * SMALL + (1.0 if name.endswith("weight") else 0.0)
    return numbers.to(dtype)


def random_files(name: str, config: ModelConfig) -> ModelFiles:
    """In the place of a model's files: there are none."""
    kind: Kind = "refiner" if config.is_refiner else "base"
    identity = Identity(kind=kind, label=f"random weights of {name}'s size", config=config)
    return ModelFiles(
        name=name, path=Path(name), layout="original", components=(), identity=identity, config=config
    )


def load(files: ModelFiles, parts: Collection[Part], dtype: torch.dtype, device: torch.device) -> SDXL:
    """Parts of a model in one precision; random numbers where it has no files."""
    if files.components:
        return load_model(files, parts, dtype=dtype, vae_dtype=dtype, device=device)
    return random_model(files.config, parts, dtype, device)


def random_model(
    config: ModelConfig, parts: Collection[Part], dtype: torch.dtype, device: torch.device
) -> SDXL:
    """Parts of a model with random numbers for weights, ready to run."""
    with blank():
        model = SDXL(config, parts)
    state = {
        name: random_tensor(name, tensor.shape, dtype, device)
        if tensor.is_floating_point()
        else torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.to(device).eval().requires_grad_(False)


class RandomWeights(FileWeights):
    """Weights without a file; every part stays, as making it again would be timed otherwise."""

    def _load(self, part: Part, dtype: torch.dtype | None = None, device: torch.device | None = None) -> SDXL:
        own = self.vae_dtype if part == "vae" else self.dtype
        return random_model(self.config, (part,), dtype or own, device or self.device)


def parameter_count(config: ModelConfig, part: Part) -> int:
    """Numbers that a part has."""
    with blank():
        return sum(parameter.numel() for parameter in SDXL(config, (part,)).parameters())


def weight_bytes(config: ModelConfig, dtype: torch.dtype, vae_dtype: torch.dtype) -> dict[Part, int]:
    """Bytes of each part in memory."""
    return {
        part: parameter_count(config, part) * (vae_dtype if part == "vae" else dtype).itemsize
        for part in ALL_PARTS
    }
