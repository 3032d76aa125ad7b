"""Growing an autoencoder by a level: a trained f4 becomes the start of an f8.

An f8 autoencoder that starts from nothing learns colours late; one that starts as a trained f4 with an
average-pooling level inside already reconstructs a blurred picture, and has only details left to learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sdxl_cli.errors import UsageError
from sdxl_cli.model.config import VAEConfig
from sdxl_cli.model.vae import Autoencoder

RESIDUAL_GAIN = 0.3
"""Times the usual deviation of a residual branch's last convolution."""


@torch.no_grad()
def initialize(vae: Autoencoder) -> None:
    """Starting values for training from nothing.

    Convolutions keep the variance of what they read and residual branches start small, so that colour
    passes through from the first step; latents start with little noise.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "proj_out")):
                module.weight *= RESIDUAL_GAIN
    z = vae.config.z_channels
    assert vae.quant_conv.bias is not None
    nn.init.constant_(vae.quant_conv.bias[z:], -6.0)
    vae.quant_conv.weight[z:] *= RESIDUAL_GAIN


@torch.no_grad()
def grow(vae: Autoencoder, weights: Mapping[str, Tensor], config: VAEConfig) -> None:
    """Start ``vae`` as a smaller autoencoder with identity levels inside.

    Args:
        vae: with the same levels as ``config`` and more, of the width of the deepest; changed in place.
        weights: of the smaller autoencoder.
        config: of the smaller autoencoder.

    Raises:
        UsageError: the two do not fit.
    """
    small, large = config.channel_mult, vae.config.channel_mult
    fits = replace(config, channel_mult=large, scale_factor=vae.config.scale_factor) == vae.config
    if not fits or large[: len(small)] != small or any(mult != small[-1] for mult in large[len(small) :]):
        raise UsageError(
            f"--init has levels {small} of {config.channels} channels, the model {large} of {vae.config.channels}: "
            "a model grows only by levels of the same width below the ones it has"
        )
    vae.load_state_dict(weights, strict=False)
    for level in range(len(small), len(large)):
        for stage in (vae.encoder.down[level], vae.decoder.up[level]):
            for block in stage.get_submodule("block").children():
                _zeroed(block, "conv2")
        _pool(_zeroed(vae.encoder, f"down.{level - 1}.downsample.conv"))
        _pass(_zeroed(vae.decoder, f"up.{level}.upsample.conv"))


def _zeroed(module: nn.Module, name: str) -> nn.Conv2d:
    """A convolution inside ``module``, its weight and bias set to 0."""
    conv = module.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def _pool(conv: nn.Conv2d) -> None:
    """Average each 2x2 block of every channel; the other taps start at 0 (padding is right and below)."""
    for channel in range(conv.in_channels):
        conv.weight[channel, channel, :2, :2] = 0.25


def _pass(conv: nn.Conv2d) -> None:
    """Let every channel through unchanged."""
    for channel in range(conv.in_channels):
        conv.weight[channel, channel, 1, 1] = 1.0
