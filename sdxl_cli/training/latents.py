"""What the latents of an autoencoder are like, and the number that makes them ready for a U-Net."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_cli.model.vae import Autoencoder

KEY = "sdxl.latents"
"""Metadata of an autoencoder's file: the statistics, as JSON."""


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """Of unscaled posterior samples."""

    pictures: int
    values: int
    mean: float
    std: float
    """Over all values of all channels together."""
    channel_mean: list[float]
    channel_std: list[float]

    @property
    def scale_factor(self) -> float:
        """1 / std: latents times it have deviation 1 (arXiv 2112.10752, appendix G)."""
        return 1.0 / self.std

    def to_json(self) -> str:
        """For the metadata of a file."""
        found: dict[str, Any] = {"scale_factor": self.scale_factor, **asdict(self)}
        return json.dumps(found)


@torch.no_grad()
def latent_statistics(vae: Autoencoder, images: Sequence[Tensor], seed: int = 0) -> LatentStatistics:
    """Measure the latents of whole pictures [3, H, W] in -1 … 1.

    The deviation is the original's ``z.flatten().std()`` (``scale_by_std`` of latent diffusion), over as many pictures
    as are given and not the first batch alone: of posterior samples, all channels as one, without taking the channels'
    means off.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    z = vae.config.z_channels
    count, total, squares = 0, torch.zeros(z, dtype=torch.float64), torch.zeros(z, dtype=torch.float64)
    for image in images:
        moments = vae.encode(image[None].to(next(vae.parameters()).device))
        noise = torch.randn(moments.mean.shape, generator=generator).to(moments.mean)
        latent = moments.sample(noise).cpu().double()[0].flatten(1)
        count += latent.shape[1]
        total, squares = total + latent.sum(1), squares + latent.square().sum(1)
    mean = total / count
    whole = float(mean.mean())
    variance = (float(squares.sum()) - count * z * whole**2) / (count * z - 1)
    std = (squares / count - mean.square()).sqrt()
    return LatentStatistics(len(images), count * z, whole, variance**0.5, mean.tolist(), std.tolist())


@torch.no_grad()
def normalize_latents(vae: Autoencoder, found: LatentStatistics) -> None:
    """Fold a shift and scale of every latent channel into the 1x1 convolutions around the latent.

    Afterwards latents times ``scale_factor`` have mean 0 and deviation 1 in every channel, and
    reconstructions are what they were.

    Args:
        vae: changed in place.
        found: statistics of its latents.
    """
    like = vae.quant_conv.weight
    std = torch.tensor(found.channel_std, dtype=torch.float64)
    gain = (1.0 / (std * vae.config.scale_factor)).to(like)
    shift = torch.tensor(found.channel_mean).to(like)
    z = len(gain)
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant.bias is not None
    assert post.bias is not None
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight /= gain.view(1, -1, 1, 1)
    quant.weight[:z] *= gain.view(-1, 1, 1, 1)
    quant.bias[:z] = (quant.bias[:z] - shift) * gain
    quant.bias[z:] += 2 * gain.log()
