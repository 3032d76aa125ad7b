"""Pixels to latents and back, through a model's autoencoder."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from sdxl_cli.generation.checks import require_finite
from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.tiling import decoded_in_tiles, encoded_in_tiles
from sdxl_cli.generation.weights import Weights
from sdxl_cli.model.vae import Moments


def encode(image: Tensor, weights: Weights, *, tile: int | None = None) -> Moments:
    """An image [1, 3, H, W] in -1 … 1 to the posterior of its unscaled latents [1, z, h, w], fp32 on the CPU.

    Args:
        image: sides are multiples of the downsampling factor.
        weights: whose autoencoder it goes through.
        tile: side of the tiles, in latents; None takes the image as a whole.

    Raises:
        NumericError: the autoencoder gave NaN or infinity.
    """
    vae = weights.vae()

    def both(part: Tensor) -> Tensor:
        moments = vae.encode(part.to(weights.device, weights.vae_dtype))
        return torch.cat([moments.mean, moments.logvar], dim=1)

    factor = weights.config.vae.downsampling
    found = both(image) if tile is None else encoded_in_tiles(both, image, factor=factor, tile=tile)
    require_finite(found, "the autoencoder, encoding", weights.vae_dtype, "--vae-dtype")
    mean, logvar = found.float().cpu().chunk(2, dim=1)
    return Moments(mean, logvar)


def decode(latent: Tensor, weights: Weights, *, tile: int | None = None) -> Pixels:
    """A latent [1, z, h, w] to RGB pixels [8h, 8w, 3], uint8. Arguments as for :func:`encode`.

    Raises:
        NumericError: the autoencoder gave NaN or infinity.
    """
    vae = weights.vae()
    z = vae.from_latent(latent.float()).to(weights.device, weights.vae_dtype)
    factor = weights.config.vae.downsampling
    image = vae.decode(z) if tile is None else decoded_in_tiles(vae.decode, z, factor=factor, tile=tile)
    image = image.float()
    require_finite(image, "the autoencoder, decoding", weights.vae_dtype, "--vae-dtype")
    levels = ((image + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    pixels: Pixels = rearrange(levels, "1 c h w -> h w c").cpu().numpy()
    return pixels


def to_image(pixels: Pixels) -> Tensor:
    """[H, W, 3] uint8 to [1, 3, H, W] in -1 … 1, fp32."""
    return rearrange(torch.from_numpy(pixels.copy()), "h w c -> 1 c h w").float() / 127.5 - 1
