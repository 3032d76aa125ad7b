"""Between two passes of a run: latents enlarged, and random numbers that are new."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.generation.autoencode import to_image
from sdxl_cli.generation.canvas import resized
from sdxl_cli.generation.plan import Plan
from sdxl_cli.generation.request import Upscaler
from sdxl_cli.generation.rescue import Listener, decode_safely, encode_safely
from sdxl_cli.generation.weights import Weights


def later_streams(seeds: Sequence[int], number: int) -> NoiseStreams:
    """The random numbers of pictures in their pass ``number`` (from 1), unrelated to those of the pass before.

    The same seeds again would put the very noise back that the first pass has just been led by.
    """
    names = [f"{seed} pass {number}".encode() for seed in seeds]
    digests = [hashlib.blake2b(name, digest_size=7).digest() for name in names]
    return NoiseStreams([int.from_bytes(digest, "little") for digest in digests])


def enlarged(
    latents: Tensor,
    plan: Plan,
    upscaler: Upscaler,
    weights: Weights,
    streams: NoiseStreams,
    report: Listener,
) -> Tensor:
    """Clean latents for a larger picture.

    Args:
        latents: scaled, [B, z, h, w].
        plan: of the larger pass.
        upscaler: ``latent`` stretches them as they are, bilinearly (as A1111's "Latent"), which blurs and wants a
            strength of 0.5 or more afterwards; ``lanczos`` enlarges the decoded picture, which costs a decoding and
            an encoding.
        weights: whose latents they are.
        streams: of the pictures; the posterior's noise is drawn from them.
        report: is told when memory runs out.

    Returns:
        fp32 [B, z, H, W] on the CPU.
    """
    size, tiling = plan.framing.size, plan.request.vae_tiling
    if upscaler == "latent":
        factor = weights.config.vae.downsampling
        target = (size[0] // factor, size[1] // factor)
        return functional.interpolate(latents.float().cpu(), size=target, mode="bilinear")

    def free() -> str:
        weights.forget()
        return ""

    posteriors = []
    for latent in latents:
        pixels, _ = decode_safely(latent[None], weights, report, tiling=tiling, before_retry=free)
        moments = encode_safely(to_image(resized(pixels, size)), weights, report, tiling=tiling)
        posteriors.append(moments)
    noise = streams.next(posteriors[0].mean.shape[1:])
    drawn = [moments.sample(noise[i : i + 1]) for i, moments in enumerate(posteriors)]
    return torch.cat(drawn) * weights.config.vae.scale_factor
