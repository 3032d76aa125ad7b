"""How much memory a run will need, from tables of contents and shapes alone: nothing is loaded or computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.read import open_tensors
from sdxl_cli.checkpoint.vocabulary import Expanded
from sdxl_cli.generation.streaming import streamed_bytes
from sdxl_cli.generation.weights import Weights
from sdxl_cli.model.config import ALL_PARTS, PREFIXES, ModelConfig, Part
from sdxl_cli.model.live_bytes import LiveBytes
from sdxl_cli.model.sdxl import SDXL

_UNET: tuple[Part, ...] = ("unet",)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that one model takes."""

    weights: Mapping[Part, int]
    """By part, in the precision it runs in."""
    work: Mapping[Part, int]
    """What a pass through a part needs beside its weights; the text encoders' is too little to count."""

    def peak(self, *, together: bool) -> int:
        """The most at one time, when all parts stay loaded or when they take turns."""
        if together:
            return sum(self.weights.values()) + max(self.work.values(), default=0)
        return max(self.weights[part] + self.work.get(part, 0) for part in self.weights)


def part_bytes(files: ModelFiles, dtype: torch.dtype, vae_dtype: torch.dtype) -> dict[Part, int]:
    """Bytes of the weights by part, in these precisions; read from the files' tables of contents."""
    counts = dict.fromkeys(ALL_PARTS, 0)
    for name, shape in Expanded(open_tensors(files), files.config).shapes.items():
        for part in ALL_PARTS:
            if name.startswith(PREFIXES[part]):
                counts[part] += math.prod(shape)
    widths = {part: (vae_dtype if part == "vae" else dtype).itemsize for part in ALL_PARTS}
    return {part: count * widths[part] for part, count in counts.items()}


def estimate(
    files: ModelFiles, weights: Weights, *, size: tuple[int, int], batch: int, tokens: int, decodes: bool
) -> Needs:
    """What a model needs for pictures of ``size``.

    Args:
        files: the model's.
        weights: where and in what precision it runs.
        size: (height, width) in pixels, of the largest pass.
        batch: rows that go through the U-Net at once: twice the pictures, with guidance.
        tokens: rows of text features, 77 for each chunk.
        decodes: whether its autoencoder is used.
    """
    config = weights.config
    height, width = (side // config.vae.downsampling for side in size)
    with torch.device("meta"):
        unet = SDXL(config, _UNET).unet.to(weights.dtype).eval().requires_grad_(False)
        x = torch.empty(batch, config.unet.in_channels, height, width, dtype=weights.dtype)
        timesteps = torch.empty(batch, dtype=torch.long)
        context = torch.empty(batch, tokens, config.unet.context_dim, dtype=weights.dtype)
        vector = torch.empty(batch, config.unet.adm_in_channels, dtype=weights.dtype)
        work: dict[Part, int] = {}
        with torch.inference_mode(), LiveBytes() as seen:
            unet(x, timesteps, context, vector)
        work["unet"] = seen.peak
    if decodes:
        work["vae"] = decoding_bytes(config, size, weights.vae_dtype, strips=weights.device.type == "cpu")
    held = part_bytes(files, weights.dtype, weights.vae_dtype)
    if weights.streams:
        held["unet"] = streamed_bytes(config.unet, weights.dtype)
    if not decodes:
        del held["vae"]
    return Needs(held, work)


STRIPS_WORK = 256 << 20
"""Bytes of the strips themselves."""


def decoding_bytes(
    config: ModelConfig, size: tuple[int, int], dtype: torch.dtype, *, strips: bool = True
) -> int:
    """What decoding a picture of (height, width) pixels needs, beside the autoencoder's weights.

    Args:
        config: of the model.
        size: of the picture.
        dtype: what is computed in.
        strips: whether it is done strip by strip, or in one piece.
    """
    widths = [config.vae.channels * mult for mult in config.vae.channel_mult]
    doubled = widths[min(1, len(widths) - 1)]
    """Channels of what was doubled last, where the peak is."""
    if strips:  # beside it the next level's first convolution
        return math.prod(size) * (widths[0] + doubled) * dtype.itemsize + STRIPS_WORK
    # beside it the same normalised, and what is made of that
    return math.prod(size) * (2 * doubled + widths[0]) * dtype.itemsize
