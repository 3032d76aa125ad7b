"""The diffusion objective: what is added to a latent, what the network should say, and how much it counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_cli.diffusion.denoiser import input_scale
from sdxl_cli.diffusion.formulation import Prediction


@dataclass(frozen=True, slots=True)
class Noised:
    """A noisy batch and its target."""

    network_input: Tensor
    """(x0 + sigma · noise) / sqrt(sigma² + 1) [B, C, h, w]."""
    target: Tensor
    """What the network should predict [B, C, h, w]."""
    weight: Tensor
    """Of each sample's loss [B]."""


def training_noise(shape: tuple[int, ...], offset: float, generator: torch.Generator) -> Tensor:
    """Standard normal noise plus ``offset`` times one number per sample (facts: sgm loss.py at SDXL 1.0)."""
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn((shape[0], 1, 1, 1), generator=generator)
    return noise


def min_snr_weight(prediction: Prediction, sigma: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma), / SNR for eps, / (SNR + 1) for v, SNR = 1 / sigma² (arXiv 2303.09556, section 3.4).

    At pure noise (zero terminal SNR) it is 0 for v and x0: that level then teaches nothing.

    Args:
        prediction: what the network predicts.
        sigma: [B].
        gamma: 0 weighs all alike.
    """
    if not gamma:
        return torch.ones_like(sigma)
    snr = sigma.square().reciprocal()
    units = {"eps": snr, "v": snr + 1.0, "x0": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / units[prediction]


def add_noise(latent: Tensor, noise: Tensor, sigma: Tensor, prediction: Prediction, gamma: float) -> Noised:
    """Noise a batch of clean latents.

    Args:
        latent: x0 [B, C, h, w].
        noise: [B, C, h, w].
        sigma: noise levels [B].
        prediction: eps: the target is the noise; v: (noise - sigma · x0) / sqrt(sigma² + 1)
            (arXiv 2202.00512, appendix D); x0: the clean latent.
        gamma: see :func:`min_snr_weight`.
    """
    level = sigma.view(-1, 1, 1, 1)
    scale = input_scale(level)
    targets = {"eps": noise, "v": scale * (noise - level * latent), "x0": latent}
    return Noised(
        scale * (latent + level * noise),
        targets[prediction],
        min_snr_weight(prediction, sigma, gamma),
    )


def weighted_mse(output: Tensor, noised: Noised) -> tuple[Tensor, Tensor]:
    """The weighted mean squared error, and each sample's unweighted one [B]."""
    per_sample = (output.float() - noised.target).square().flatten(1).mean(dim=1)
    return (noised.weight * per_sample).mean(), per_sample.detach()
