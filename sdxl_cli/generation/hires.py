"""Between two passes of a run: latents enlarged, and random numbers that are new."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.generation.autoencode import decode, encode, to_image
from sdxl_cli.generation.canvas import resized
from sdxl_cli.generation.request import Upscaler
from sdxl_cli.generation.sizes import Size
from sdxl_cli.generation.weights import Weights


def later_streams(seeds: Sequence[int], number: int) -> NoiseStreams:
    """The random numbers of pictures in their pass ``number`` (from 1), unrelated to those of the pass before.

    The same seeds again would put the very noise back that the first pass has just been led by.
    """
    names = [f"{seed} pass {number}".encode() for seed in seeds]
    digests = [hashlib.blake2b(name, digest_size=7).digest() for name in names]
    return NoiseStreams([int.from_bytes(digest, "little") for digest in digests])


def enlarged(
    latents: Tensor, size: Size, upscaler: Upscaler, weights: Weights, streams: NoiseStreams
) -> Tensor:
    """Clean latents for a larger picture.

    Args:
        latents: scaled, [B, z, h, w].
        size: (height, width) of the larger picture in pixels.
        upscaler: ``latent`` stretches them as they are, bilinearly (as A1111's "Latent"), which blurs and wants a
            strength of 0.5 or more afterwards; ``lanczos`` enlarges the decoded picture, which costs a decoding and
            an encoding.
        weights: whose latents they are.
        streams: of the pictures; the posterior's noise is drawn from them.

    Returns:
        fp32 [B, z, H, W] on the CPU.
    """
    if upscaler == "latent":
        factor = weights.config.vae.downsampling
        target = (size[0] // factor, size[1] // factor)
        return functional.interpolate(latents.float().cpu(), size=target, mode="bilinear")
    moments = [encode(to_image(resized(decode(latent[None], weights), size)), weights) for latent in latents]
    noise = streams.next(moments[0].mean.shape[1:])
    samples = [found.sample(noise[i : i + 1]) for i, found in enumerate(moments)]
    return torch.cat(samples) * weights.config.vae.scale_factor
