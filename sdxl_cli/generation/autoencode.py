"""Pixels to latents and back, through a model's autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from sdxl_cli.generation.checks import require_finite
from sdxl_cli.generation.memory import decoding_bytes
from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.residency import free_bytes, ran_out_of_memory
from sdxl_cli.generation.tiling import decoded_in_tiles, encoded_in_tiles
from sdxl_cli.generation.weights import Weights, convolves_fast
from sdxl_cli.model import vae_strips
from sdxl_cli.model.vae import Moments

T = TypeVar("T")

WORKSPACE = 1.2
"""What convolutions take beside their tensors, as a factor."""


def encode(image: Tensor, weights: Weights, *, tile: int | None = None) -> Moments:
    """An image [1, 3, H, W] in -1 … 1 to the posterior of its unscaled latents [1, z, h, w], fp32 on the CPU.

    Args:
        image: sides are multiples of the downsampling factor.
        weights: whose autoencoder it goes through.
        tile: side of the tiles, in latents; None takes the image as a whole.

    Raises:
        NumericError: the autoencoder gave NaN or infinity.
    """
    vae, fast = weights.vae(), convolves_fast(weights, weights.vae_dtype)
    strips = in_strips(weights, (image.shape[2], image.shape[3]))

    def both(part: Tensor) -> Tensor:
        pixels = part.to(weights.device, weights.vae_dtype)
        moments = None if strips else _unless_full(vae.encode, pixels)
        moments = moments or vae_strips.encode(vae, pixels, winograd=fast)
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
    image = decoded(latent, weights, tile=tile)
    levels = ((image + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    pixels: Pixels = rearrange(levels, "1 c h w -> h w c").cpu().numpy()
    return pixels


def decoded(latent: Tensor, weights: Weights, *, tile: int | None = None) -> Tensor:
    """What :func:`decode` rounds to pixels: [1, 3, 8h, 8w], about -1 … 1, fp32, where the autoencoder is."""
    vae, fast = weights.vae(), convolves_fast(weights, weights.vae_dtype)
    z = vae.from_latent(latent.float()).to(weights.device, weights.vae_dtype)
    factor = weights.config.vae.downsampling
    strips = in_strips(weights, (z.shape[2] * factor, z.shape[3] * factor))

    def pixels_of(part: Tensor) -> Tensor:
        whole = None if strips else _unless_full(vae.decode, part)
        return vae_strips.decode(vae, part, winograd=fast) if whole is None else whole

    image = pixels_of(z) if tile is None else decoded_in_tiles(pixels_of, z, factor=factor, tile=tile)
    image = image.float()
    require_finite(image, "the autoencoder, decoding", weights.vae_dtype, "--vae-dtype")
    return image


def in_strips(weights: Weights, size: tuple[int, int]) -> bool:
    """Whether the autoencoder goes through a picture of (height, width) strip by strip: the same in less memory.

    On a CPU always, where it is faster too; on a GPU when there is no room for the whole.
    """
    if weights.device.type != "cuda":
        return weights.device.type == "cpu"
    free = free_bytes(weights.device)
    needed = WORKSPACE * decoding_bytes(weights.config, size, weights.vae_dtype, strips=False)
    return free is not None and needed > free


def _unless_full(work: Callable[[Tensor], T], given: Tensor) -> T | None:
    """What ``work`` makes of it; None when a GPU has no memory for that, and strips, which give the same, may do."""
    try:
        return work(given)
    except (RuntimeError, MemoryError) as error:
        if given.device.type == "mps" or not ran_out_of_memory(
            error
        ):  # mps has not the fp64 that strips sum in
            raise
    if given.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def to_image(pixels: Pixels) -> Tensor:
    """[H, W, 3] uint8 to [1, 3, H, W] in -1 … 1, fp32."""
    return rearrange(torch.from_numpy(pixels.copy()), "h w c -> 1 c h w").float() / 127.5 - 1
