"""What a training step of the autoencoder is (paper section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdxl_cli.model.discriminator import PatchDiscriminator
from sdxl_cli.model.vae import Autoencoder, Moments
from sdxl_cli.training.adversarial import DISCRIMINATOR_LOSSES
from sdxl_cli.training.draws import each, streams
from sdxl_cli.training.metrics import Mean, statistics
from sdxl_cli.training.place import computing
from sdxl_cli.training.session import ALL, Share
from sdxl_cli.training.turns import Turn
from sdxl_cli.training.vae_config import VAETrainConfig
from sdxl_cli.training.vae_losses import (
    Distance,
    Reconstructed,
    ReconstructionLoss,
    with_adversary,
    without_adversary,
)

M = TypeVar("M", bound=nn.Module)

READERS = 8
"""Threads that decode pictures."""


class LearnedScale(Autoencoder):
    """An autoencoder and the scale of its errors, which is learnt along with it."""

    def __init__(self, vae: Autoencoder, logvar: float) -> None:
        """``vae`` lends its networks; ``logvar`` is where ln of the scale begins."""
        nn.Module.__init__(self)
        self.config = vae.config
        self.encoder, self.decoder = vae.encoder, vae.decoder
        self.quant_conv, self.post_quant_conv = vae.quant_conv, vae.post_quant_conv
        self.logvar = nn.Parameter(torch.tensor(logvar, device=vae.quant_conv.weight.device))


@dataclass(frozen=True, slots=True)
class Drawn:
    """All that is random in a batch."""

    image: Tensor
    """Crops [B, 3, side, side]."""
    noise: Tensor
    """By which latents differ from their means, in deviations [B, z, h, w]."""
    picks: list[int]
    """Which images the crops are of."""
    weight: float
    """Of their mean loss: 1, but where the crops of all processes are not dealt out evenly."""


@dataclass
class VAETask:
    """Random crops of random images, reconstructed, and with a discriminator told from what they should be."""

    module: Autoencoder
    images: Sequence[Tensor]
    """Images [3, H, W] in -1 … 1, at least as large as the largest crop."""
    config: VAETrainConfig
    names: Sequence[str] = ()
    """Of the images, for errors."""
    perceptual: Distance | None = None
    """LPIPS, where the loss has it."""
    discriminator: PatchDiscriminator | None = None
    share: Share = ALL
    """Which crops of a batch are this process's."""
    _loss: ReconstructionLoss = field(init=False)
    _readers: ThreadPoolExecutor = field(init=False, repr=False)
    _drawn: dict[int, Drawn] = field(default_factory=dict, repr=False)
    """Crops that the discriminator's turn of this step is still to see."""

    def __post_init__(self) -> None:
        self._loss = ReconstructionLoss(self.config.loss, self.perceptual)
        self._readers = ThreadPoolExecutor(READERS, "pictures")

    @property
    def turns(self) -> Sequence[Turn]:
        """See :class:`~sdxl_cli.training.turns.TakesTurns`."""
        first = Turn("", self.module, self.step)
        if self.discriminator is None:
            return (first,)
        own = self.config.adversarial
        second = Turn(
            "disc",
            self.discriminator,
            self.discriminate,
            optimizer=own.optimizer,
            averaged=False,
            since=own.start,
        )
        return first, second

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """See :class:`~sdxl_cli.training.turns.Task`."""
        drawn = self._draw(index, generator)
        if self.discriminator is not None and self._is_adversarial(index):
            self._drawn[index] = drawn
        batch = self._reconstruct(drawn)
        logvar = self.module.logvar if isinstance(self.module, LearnedScale) else None
        if self.discriminator is None or not self._is_adversarial(index):
            loss, said = without_adversary(self._loss, batch, logvar)
        else:
            last, own = self.module.decoder.conv_out, self.config.adversarial
            loss, said = with_adversary(self._loss, batch, logvar, self.discriminator, last, own)
        return _counted(loss, said, drawn)

    def discriminate(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The discriminator's step: the same crops, after the autoencoder's.

        Real and fake pictures go through it one after the other, each kind normalised by itself, as in the original.
        """
        assert self.discriminator is not None
        own = self.config.adversarial
        drawn = self._drawn.pop(index)
        with torch.no_grad():
            batch = self._reconstruct(drawn)
        real, fake = (self.discriminator(pictures).float() for pictures in (batch.image, batch.output))
        loss = own.factor * DISCRIMINATOR_LOSSES[own.loss](real, fake)
        said = {"logits_real": float(real.detach().mean()), "logits_fake": float(fake.detach().mean())}
        return _counted(loss, said, drawn)

    @torch.no_grad()
    def describe(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """See :class:`~sdxl_cli.training.turns.Task`."""
        drawn = self._draw(index, generator)
        names = [self.names[i] if self.names else str(i) for i in drawn.picks]
        return {"ids": names, "images": statistics(drawn.image), "crop": list(drawn.image.shape[-2:])}

    def _is_adversarial(self, index: int) -> bool:
        batches = self.config.loop.batches_per_step(self.share.began_with) * self.share.parts
        return index // batches >= self.config.adversarial.start

    def _draw(self, index: int, generator: torch.Generator) -> Drawn:
        """This process's crops of a batch, each with random numbers of its own."""
        config, share = self.config, self.share
        weights = torch.tensor(config.crop_weights)
        size = config.crop_sizes[int(torch.multinomial(weights, 1, generator=generator))]
        count = (
            max(1, config.pixels_per_step // size**2) if config.pixels_per_step else config.loop.batch_size
        )
        total = count * share.began_with
        every = torch.randint(len(self.images), (total,), generator=generator).tolist()
        mine = list(range(total))[share.mine(index)]
        weight = len(mine) * share.hands / total
        places = mine or [0]  # who has none takes part with one that does not count
        picks, random = [every[place] for place in places], streams(generator, places)
        images = self._readers.map(self.images.__getitem__, picks)  # decoding lets other threads run
        crops = [_random_crop(image, size, own) for image, own in zip(images, random, strict=True)]
        side = size // self.module.config.downsampling
        shape = 1, self.module.config.z_channels, side, side
        noise = each(random, lambda g: torch.randn(shape, generator=g))
        return Drawn(torch.stack(crops), noise, picks, weight)

    def _reconstruct(self, drawn: Drawn) -> Reconstructed:
        """A batch of crops, encoded, drawn from the posterior and decoded."""
        device = next(self.module.parameters()).device
        image = drawn.image.to(device, memory_format=torch.channels_last)
        seen: list[Tensor] = []
        hook = self.module.decoder.conv_out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            with computing(self.config.loop, device):
                moments = self.module.encode(image)
                moments = Moments(moments.mean.float(), moments.logvar.float())
                output = self.module.decode(moments.sample(drawn.noise.to(image)))
        finally:
            hook.remove()
        return Reconstructed(image, output.float(), moments, seen[0])


def _counted(loss: Tensor, said: Mapping[str, float], drawn: Drawn) -> tuple[Tensor, dict[str, float]]:
    """The loss with its weight, and means that know how many pictures they are of."""
    count = len(drawn.image) if drawn.weight else 0
    means = {name: Mean(value, count) for name, value in said.items()} if count else {}
    return loss * drawn.weight, {**means, "images": float(count)}


def _random_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in image.shape[-2:])
    return image[:, top : top + size, left : left + size]


def fresh(module: M) -> M:
    """Ready for training: channels-last memory, gradients on."""
    return module.to(memory_format=torch.channels_last).requires_grad_(True).train()
