"""What a training step of the autoencoder is (paper section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdxl_cli.model.vae import Autoencoder, Moments
from sdxl_cli.training.config import VAELossConfig, VAETrainConfig
from sdxl_cli.training.metrics import statistics
from sdxl_cli.training.place import computing

M = TypeVar("M", bound=nn.Module)

LOWPASS_BLOCKS = (8, 32)
"""Sides of the blocks whose averages are compared, in pixels."""


def lowpass_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of block averages: what is left of an error when details are ignored.

    Args:
        prediction: [B, 3, H, W].
        target: the same.
    """
    difference = prediction - target
    blocks = [b for b in LOWPASS_BLOCKS if b <= min(difference.shape[-2:])]
    return torch.stack([F.avg_pool2d(difference, b).abs().mean() for b in blocks]).mean()


def reconstruction_loss(
    config: VAELossConfig, output: Tensor, image: Tensor, moments: Moments
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of all terms, and each term by name.

    Args:
        config: weights.
        output: decoded images [B, 3, H, W].
        image: the originals, -1 … 1.
        moments: the posterior the latents were drawn from.
    """
    terms = {
        "l1": (output - image).abs().mean(),
        "l2": (output - image).square().mean(),
        "lowpass": lowpass_l1(output, image),
        "kl": moments.kl().mean() / moments.mean[0].numel(),
    }
    start = torch.zeros((), device=image.device)
    loss = sum((getattr(config, name) * term for name, term in terms.items()), start)
    return loss, {name: float(term.detach()) for name, term in terms.items()}


@dataclass
class VAETask:
    """Random crops of random images, reconstructed."""

    module: Autoencoder
    images: Sequence[Tensor]
    """Images [3, H, W] in -1 … 1, at least as large as the largest crop."""
    config: VAETrainConfig
    names: Sequence[str] = ()
    """Of the images, for errors."""

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """See :class:`~sdxl_cli.training.loop.Task`."""
        image, _ = self._batch(generator)
        device = next(self.module.parameters()).device
        image = image.to(device, memory_format=torch.channels_last)
        with computing(self.config.loop, device):
            moments = self.module.encode(image)
            moments = Moments(moments.mean.float(), moments.logvar.float())
            noise = torch.randn(moments.mean.shape, generator=generator)
            output = self.module.decode(moments.sample(noise.to(image)))
        loss, terms = reconstruction_loss(self.config.loss, output.float(), image, moments)
        return loss, {**terms, "images": float(len(image))}

    @torch.no_grad()
    def describe(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """See :class:`~sdxl_cli.training.loop.Task`."""
        image, picks = self._batch(generator)
        names = [self.names[i] if self.names else str(i) for i in picks]
        return {"ids": names, "images": statistics(image), "crop": list(image.shape[-2:])}

    def _batch(self, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        """Crops [B, 3, side, side], and which images they are of."""
        config = self.config
        weights = torch.tensor(config.crop_weights)
        size = config.crop_sizes[int(torch.multinomial(weights, 1, generator=generator))]
        count = (
            max(1, config.pixels_per_step // size**2) if config.pixels_per_step else config.loop.batch_size
        )
        picks = torch.randint(len(self.images), (count,), generator=generator).tolist()
        return torch.stack([_random_crop(self.images[i], size, generator) for i in picks]), picks


def _random_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in image.shape[-2:])
    return image[:, top : top + size, left : left + size]


@torch.no_grad()
def latent_statistics(vae: Autoencoder, images: Sequence[Tensor], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of unscaled posterior samples, per channel, over whole images.

    Returns:
        float64 [z], [z].
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for image in images:
        moments = vae.encode(image[None].to(next(vae.parameters()).device))
        noise = torch.randn(moments.mean.shape, generator=generator).to(moments.mean)
        z = moments.sample(noise).cpu().double()[0].flatten(1)
        count += z.shape[1]
        total, squares = total + z.sum(1), squares + z.square().sum(1)
    mean = total / count
    return mean, (squares / count - mean.square()).sqrt()


@torch.no_grad()
def normalize_latents(vae: Autoencoder, mean: Tensor, std: Tensor) -> None:
    """Fold a shift and scale of every latent channel into the 1x1 convolutions around the latent.

    Afterwards latents times ``scale_factor`` have mean 0 and deviation 1 in every channel, and
    reconstructions are what they were.

    Args:
        vae: changed in place.
        mean: of unscaled latents, per channel [z].
        std: the same.
    """
    gain = (1.0 / (std * vae.config.scale_factor)).float()
    shift = mean.float()
    z = len(gain)
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant.bias is not None
    assert post.bias is not None
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight /= gain.view(1, -1, 1, 1)
    quant.weight[:z] *= gain.view(-1, 1, 1, 1)
    quant.bias[:z] = (quant.bias[:z] - shift) * gain
    quant.bias[z:] += 2 * gain.log()


def fresh(module: M) -> M:
    """Ready for training: channels-last memory, gradients on."""
    return module.to(memory_format=torch.channels_last).requires_grad_(True).train()
