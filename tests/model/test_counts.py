"""The released networks have the released numbers of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdxl_cli.model.config import BASE, BIG_G, CLIP_L, REFINER
from sdxl_cli.model.text import ClipLEmbedder, OpenClipEmbedder
from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder

COUNTS = {
    "base U-Net": (lambda: UNet(BASE.unet), 2_567_463_684, 1680),
    "refiner U-Net": (lambda: UNet(REFINER.unet), 2_259_526_660, 1220),
    "autoencoder": (lambda: Autoencoder(BASE.vae), 83_653_863, 248),
    "CLIP-L": (lambda: ClipLEmbedder(CLIP_L), 123_060_480, 196),
    "bigG with logit_scale": (lambda: OpenClipEmbedder(BIG_G), 694_659_841, 390),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_number_of_parameters(name: str) -> None:
    build, numbers, tensors = COUNTS[name]
    with torch.device("meta"):
        network: nn.Module = build()
    parameters = list(network.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (numbers, tensors)
