"""Pixels to latents and back, through a model's autoencoder."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from sdxl_cli.generation.checks import require_finite
from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.weights import Weights
from sdxl_cli.model.vae import Moments


def encode(image: Tensor, weights: Weights) -> Moments:
    """An image [1, 3, H, W] in -1 … 1 to the posterior of its unscaled latents [1, z, h, w], fp32 on the CPU.

    Raises:
        NumericError: the autoencoder gave NaN or infinity.
    """
    vae = weights.vae()
    found = vae.encode(image.to(weights.device, weights.vae_dtype))
    for values in (found.mean, found.logvar):
        require_finite(values, "the autoencoder, encoding", weights.vae_dtype, "--vae-dtype")
    return Moments(found.mean.float().cpu(), found.logvar.float().cpu())


def decode(latent: Tensor, weights: Weights) -> Pixels:
    """A latent [1, z, h, w] to RGB pixels [8h, 8w, 3], uint8.

    Raises:
        NumericError: the autoencoder gave NaN or infinity.
    """
    vae = weights.vae()
    image = vae.decode(vae.from_latent(latent.float()).to(weights.vae_dtype)).float()
    require_finite(image, "the autoencoder, decoding", weights.vae_dtype, "--vae-dtype")
    levels = ((image + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    pixels: Pixels = rearrange(levels, "1 c h w -> h w c").cpu().numpy()
    return pixels


def to_image(pixels: Pixels) -> Tensor:
    """[H, W, 3] uint8 to [1, 3, H, W] in -1 … 1, fp32."""
    return rearrange(torch.from_numpy(pixels.copy()), "h w c -> 1 c h w").float() / 127.5 - 1
