"""Where the latents of a picture begin: noise, noise on a picture, or noise on the part of it that is repainted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.generation.autoencode import to_image
from sdxl_cli.generation.mask import to_latent
from sdxl_cli.generation.plan import Plan
from sdxl_cli.generation.request import MaskContent
from sdxl_cli.generation.rescue import Listener, encode_safely
from sdxl_cli.generation.weights import Weights
from sdxl_cli.model.config import VAEConfig
from sdxl_cli.model.vae import Moments

PLAIN, INPAINTING = 4, 9
"""Input channels of the two kinds of U-Net: the latents; the latents, a mask, and the latents of what it leaves."""


@dataclass(frozen=True, slots=True)
class Held:
    """What is not repainted: kept on its own way from noise to the old picture.

    At every noise level it is the clean latents with the first noise, as much of it as belongs there (as in
    diffusers' StableDiffusionXLInpaintPipeline). Set before the network looks, it is the same for samplers that look
    several times per step, or add noise of their own.
    """

    clean: Tensor
    """[B, z, h, w]."""
    noise: Tensor
    """[B, z, h, w], standard normal."""
    repaint: Tensor
    """[1, 1, h, w]: 1 where the run decides, 0 where this does."""

    def to(self, device: torch.device) -> Held:
        """The same on another device."""
        return Held(self.clean.to(device), self.noise.to(device), self.repaint.to(device))

    def before(self, x: Tensor, sigma: float) -> Tensor:
        """What the network is shown in place of x [B, z, h, w] at a noise level."""
        return torch.where(self.repaint > 0, x, self.clean + sigma * self.noise)

    def after(self, denoised: Tensor) -> Tensor:
        """What the sampler is told instead of the network's clean latents [B, z, h, w]."""
        return torch.where(self.repaint > 0, denoised, self.clean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a batch begins, all fp32."""

    x: Tensor
    """[B, z, h, w], at the first noise level."""
    held: Held | None = None
    """What is not repainted; None when all is."""
    seen: Tensor | None = None
    """[B, 5, h, w]: what an inpainting U-Net is shown beside the latents; None for others."""

    def to(self, device: torch.device) -> Start:
        """The same on another device."""
        held = None if self.held is None else self.held.to(device)
        return Start(x=self.x.to(device), held=held, seen=None if self.seen is None else self.seen.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What all pictures of a run begin with, encoded once."""

    vae: VAEConfig
    picture: Moments | None = None
    """Of the picture to start from; None: there is none."""
    repaint: Tensor | None = None
    """[1, 1, h, w] of 0 and 1; None: all."""
    remaining: Moments | None = None
    """Of the picture with grey in place of what is repainted, for inpainting U-Nets."""
    content: MaskContent = "original"

    def start(
        self, plan: Plan, streams: NoiseStreams, made: Tensor | None = None, held: Held | None = None
    ) -> Start:
        """Where the pictures of these random streams begin.

        A stream is asked for the posterior's noise, the first latents, and the other posterior's, in this order,
        which is that of diffusers' pipelines.

        Args:
            plan: says which noise level, and which size.
            streams: the pictures' random numbers.
            made: clean latents to go on from instead of this picture's [B, z, h, w].
            held: what was not repainted of them.
        """
        (height, width), sigma = plan.framing.size, plan.sigmas[0]
        shape = (self.vae.z_channels, height // self.vae.downsampling, width // self.vae.downsampling)
        clean, repaint = made, self.repaint if held is None else held.repaint
        if made is None and self.picture is not None:
            clean = self._sample(self.picture, streams)
        noise = streams.next(shape)
        seen = None
        if self.remaining is not None:
            rest = self._sample(self.remaining, streams)
            mask = torch.ones(1, 1, *shape[1:]) if repaint is None else repaint
            seen = torch.cat([mask.expand(len(rest), -1, -1, -1), rest], dim=1)
        x = from_noise(noise, sigma)
        if clean is None:
            return Start(x=x, seen=seen)
        over = clean + noise * sigma
        if repaint is None:
            return Start(x=over, seen=seen)
        if self.content == "noise" and made is None:
            over = torch.where(repaint > 0, x, over)
        return Start(x=over, held=Held(clean if held is None else held.clean, noise, repaint), seen=seen)

    def _sample(self, moments: Moments, streams: NoiseStreams) -> Tensor:
        """A scaled latent per stream [B, z, h, w]: of the posterior, as the original takes it."""
        return moments.sample(streams.next(moments.mean.shape[1:])) * self.vae.scale_factor


def from_noise(noise: Tensor, sigma: Tensor) -> Tensor:
    """Latents at the noise level ``sigma`` with nothing below: standard normal noise, and a clean latent's variance.

    sgm: x = noise · sqrt(1 + sigma²), as a clean latent of variance 1 would have with noise on top.
    """
    return noise * (1 + sigma.square()).sqrt()


def encode_source(plan: Plan, weights: Weights, report: Listener) -> Source:
    """Encode what a plan starts from; loads the autoencoder only when there is something to encode.

    Raises:
        NumericError: the autoencoder gave NaN or infinity.
        MemoryLimitError: it does not fit, in tiles neither.
    """
    canvas, config = plan.canvas, weights.config

    def encoded(image: Tensor) -> Moments:
        return encode_safely(image, weights, report, tiling=plan.request.vae_tiling)

    height, width = plan.framing.size
    inpainting = config.unet.in_channels == INPAINTING
    if canvas is None:
        # an inpainting model is told that nothing is known
        blank = torch.zeros(1, 3, height, width)
        return Source(vae=config.vae, remaining=encoded(blank) if inpainting else None)
    image, repaint, covered = to_image(canvas.pixels), None, torch.ones(height, width, dtype=torch.bool)
    if canvas.repaint is not None:
        repaint, covered = (
            to_latent(canvas.repaint, config.vae.downsampling),
            torch.from_numpy(canvas.repaint),
        )
    return Source(
        vae=config.vae,
        picture=encoded(image),
        repaint=repaint,
        remaining=encoded(image * ~covered) if inpainting else None,
        content=plan.mask_content,
    )
