"""The patch discriminator that autoencoders are trained against. Parameter names are those of the original."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

SLOPE = 0.2
"""Of the leaky ReLUs below zero."""
INIT_STD = 0.02
"""Deviation of starting weights (pix2pix, section 6.2 of arXiv 1611.07004)."""
MOST_WIDENING = 8
"""Layers double their channels up to this many times the first one's."""


class PatchDiscriminator(nn.Module):
    """Says of every patch of a picture how real it looks: PatchGAN (arXiv 1611.07004, section 3.2.2).

    Built as ``NLayerDiscriminator`` of taming-transformers, whose checkpoints fit: 4x4 convolutions, the first
    ``layers`` of them with stride 2, batch norm after all but the first and the last. With three, every number judges
    70x70 pixels.

    Batch norm always uses the statistics of the batch it is given: pictures of one forward pass on one device, as in
    the original, which synchronises nothing. So a step is the same computation on n devices and on one that
    accumulates n batches. Its running averages are kept for the names' sake and are never used.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        """Args:
        in_channels: of the pictures.
        channels: of the first layer.
        layers: how often sides are halved.
        """
        super().__init__()
        self.main = nn.Sequential(*_layers(in_channels, channels, layers))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in -1 … 1 -> logits [B, 1, h, w], large where it looks real; 3 layers: h is H / 8 less 2."""
        return self.main(images)


def least_side(layers: int) -> int:
    """Pixels that a picture must have on each side so that one logit comes out."""
    # back from one logit: a 4x4 convolution with padding 1 takes a pixel from a side when its stride is 1
    return 3 * 2**layers


@torch.no_grad()
def initialize(discriminator: PatchDiscriminator) -> None:
    """Starting weights: N(0, 0.02) for convolutions, N(1, 0.02) for norms, whose biases are 0.

    Biases of convolutions are left as torch draws them, as in the original.
    """
    for module in discriminator.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, INIT_STD)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, INIT_STD)
            nn.init.zeros_(module.bias)


def _layers(in_channels: int, channels: int, layers: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(in_channels, channels, 4, stride=2, padding=1)
    yield nn.LeakyReLU(SLOPE)
    width = channels
    for level in range(1, layers + 1):
        before, width = width, channels * min(2**level, MOST_WIDENING)
        stride = 2 if level < layers else 1
        yield nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False)  # the norm has one
        yield nn.BatchNorm2d(width)
        yield nn.LeakyReLU(SLOPE)
    yield nn.Conv2d(width, 1, 4, stride=1, padding=1)
