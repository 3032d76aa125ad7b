"""The noise levels SDXL was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def signal_shares() -> Tensor:
    """ᾱ of the 1000 noise levels, descending: products of 1 - beta with "scaled linear" betas (sgm discretizer.py).

    Returns:
        float64 [1000].
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def sigma_table() -> Tensor:
    """The 1000 noise levels, ascending, 0.0292 … 14.6146: sigma² = (1 - ᾱ) / ᾱ, in float64 until the last step.

    Returns:
        float32 [1000].
    """
    alphas = signal_shares()
    return ((1.0 - alphas) / alphas).float() ** 0.5


class NoiseSchedule:
    """The table of noise levels, with the two ways through it: index -> sigma and sigma -> nearest index."""

    def __init__(self, sigmas: Tensor | None = None) -> None:
        self.sigmas = sigma_table() if sigmas is None else sigmas
        """float32 [1000], ascending, on the CPU."""

    @property
    def sigma_min(self) -> float:
        """The smallest noise level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The largest noise level."""
        return float(self.sigmas[-1])

    def index_of(self, sigma: float) -> int:
        """The index of the nearest noise level; the lower one on a tie (sgm DiscreteDenoiser)."""
        return int((self.sigmas - sigma).abs().argmin())

    def at(self, index: Tensor) -> Tensor:
        """Noise levels at fractional indices, linear in log sigma (k-diffusion t_to_sigma)."""
        low, high = index.floor().long(), index.ceil().long()
        weight = (index - low).float()
        logs = self.sigmas.log()
        return ((1 - weight) * logs[low] + weight * logs[high]).exp()
