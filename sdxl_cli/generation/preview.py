"""Previews: latents as small pictures, without the autoencoder's decoder.

A latent pixel is nearly a colour: a linear map of its channels shows what the picture will be. The map is fitted to
the autoencoder at hand, by least squares over pictures made up for it, so that any autoencoder has one. What is
shown is the network's guess of the clean latent, not the noisy one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.errors import unknown
from sdxl_cli.generation.observe import Step
from sdxl_cli.generation.picture import FORMATS, Pixels
from sdxl_cli.model.vae import Autoencoder

Show = Callable[[Pixels], None]
"""Does something with a preview, RGB [h, w, 3]."""

TERMINAL_COLUMNS = 64
_SHORTEST_SIDE = 512
"""Of a preview file, unless the picture itself is smaller: pixels."""


@dataclass(frozen=True, slots=True)
class LatentColours:
    """The linear map from latents to colours."""

    weight: Tensor
    """fp32 [z, 3], for latents times the scale factor; colours in -1 … 1."""
    bias: Tensor
    """fp32 [3]."""

    def __call__(self, latents: Tensor) -> Pixels:
        """Latents [B, z, h, w] to RGB [h, B · w, 3], uint8, side by side."""
        colours = torch.einsum("bzhw,zc->bchw", latents.float().cpu(), self.weight)
        levels = ((colours + self.bias[:, None, None] + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
        pixels: Pixels = rearrange(levels, "b c h w -> h (b w) c").numpy()
        return pixels


@torch.inference_mode()
def fit_colours(vae: Autoencoder) -> LatentColours:
    """Fit the map to an autoencoder: latents of smooth coloured pictures against the pictures, made small.

    The pictures come from a fixed seed, so the map is the same every time.
    """
    weight = next(vae.parameters())
    factor = vae.config.downsampling
    pictures = _training_pictures(factor * 16)
    latents = vae.to_latent(vae.encode(pictures.to(weight)).mode()).float().cpu()
    samples = rearrange(latents, "b z h w -> (b h w) z").double()
    colours = rearrange(F.avg_pool2d(pictures, factor), "b c h w -> (b h w) c").double()
    inputs = torch.cat([samples, torch.ones(len(samples), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(inputs, colours).solution.float()
    return LatentColours(solution[:-1], solution[-1])


class Preview:
    """Shows every so many steps what the picture would be."""

    def __init__(self, colours: LatentColours, show: Show, interval: int = 1) -> None:
        """``interval``: steps between two previews; the last step is always shown."""
        self._colours, self._show, self._interval = colours, show, interval

    def step(self, step: Step) -> None:
        """Look at a step."""
        if step.done % self._interval == 0 or step.done == step.total:
            self._show(self._colours(step.denoised))


def to_file(path: Path) -> Show:
    """Previews to one file, each in the place of the one before; a reader never sees half a picture.

    Raises:
        UsageError: the suffix is not one of a picture format.
    """
    if path.suffix.lower() not in FORMATS:
        raise unknown("picture format", path.suffix, FORMATS)

    def show(pixels: Pixels) -> None:
        image = Image.fromarray(pixels)
        times = max(1, _SHORTEST_SIDE // min(image.size))
        image = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
        with atomic_write(path, overwrite=True) as temporary:
            image.save(temporary, FORMATS[path.suffix.lower()])

    return show


def to_rows(pixels: Pixels, columns: int = TERMINAL_COLUMNS) -> list[list[tuple[int, int, int]]]:
    """A preview as rows of colours, at most ``columns`` wide; wider ones are made smaller."""
    image = Image.fromarray(pixels)
    if image.width > columns:
        height = max(2, round(image.height * columns / image.width))
        image = image.resize((columns, height), Image.Resampling.BOX)
    return [[(int(r), int(g), int(b)) for r, g, b in row] for row in np.asarray(image)]


def _training_pictures(side: int) -> Tensor:
    """Coloured pictures from flat to finely mottled, [12, 3, side, side] in -1 … 1."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for cells in (1, 1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 16):
        colours = torch.rand(1, 3, cells, cells, generator=generator) * 2 - 1
        mode = "nearest" if cells <= 2 else "bilinear"
        corners = None if mode == "nearest" else False
        made.append(F.interpolate(colours, (side, side), mode=mode, align_corners=corners))
    return torch.cat(made)
