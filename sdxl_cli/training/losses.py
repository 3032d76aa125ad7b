"""The diffusion objective: what is added to a latent, what the network should say, and how much it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_cli.diffusion.denoiser import input_scale
from sdxl_cli.diffusion.formulation import Prediction
from sdxl_cli.diffusion.schedule import TRAIN_STEPS
from sdxl_cli.training.metrics import Mean

BIN = 100
"""Noise levels in a bin of the report."""


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


def debiased_weight(sigma: Tensor) -> Tensor:
    """1 / sqrt(SNR) = sigma: the eps loss counts by the error of the clean latent it implies (arXiv 2310.08442)."""
    return sigma


def level_weight(weights: Sequence[float], index: Tensor) -> Tensor:
    """The weight of each noise level's part of the 1000; 1 when there are none.

    Args:
        weights: of equal parts, from the least noise on.
        index: of noise levels, 0 … 999 [B].
    """
    if not weights:
        return torch.ones(len(index))
    return torch.tensor(weights)[index * len(weights) // TRAIN_STEPS]


def add_noise(latent: Tensor, noise: Tensor, sigma: Tensor, prediction: Prediction, gamma: float) -> Noised:
    """Noise a batch of clean latents.

    With continuous levels this is the preconditioning of EDM for data of deviation 1 (arXiv 2206.00364, table 1):
    c_in = c_out / sigma = 1 / sqrt(sigma² + 1), c_skip = 1 / (sigma² + 1). Its target (x0 - c_skip x) / c_out is -v,
    its weight times c_out² is 1; the sign is turned, as other programs have it in their EDM v models.

    Args:
        latent: x0 [B, C, h, w].
        noise: [B, C, h, w].
        sigma: noise levels [B], on the CPU or with the latents.
        prediction: eps: the target is the noise; v: (noise - sigma · x0) / sqrt(sigma² + 1)
            (arXiv 2202.00512, appendix D); x0: the clean latent.
        gamma: see :func:`min_snr_weight`.
    """
    level = sigma.view(-1, 1, 1, 1).to(latent.device)
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
    return (noised.weight.to(per_sample.device) * per_sample).mean(), per_sample.detach()


def by_level(per_sample: Tensor, index: Tensor) -> dict[str, Mean]:
    """The mean error in each tenth of the noise levels that the batch has: ``mse_000_099`` … ``mse_900_999``.

    Args:
        per_sample: [B].
        index: of noise levels, 0 … 999 [B].
    """
    means = {}
    for part in sorted(set((index // BIN).tolist())):
        values = per_sample[index // BIN == part]
        means[f"mse_{part * BIN:03d}_{part * BIN + BIN - 1:03d}"] = Mean(float(values.mean()), len(values))
    return means
