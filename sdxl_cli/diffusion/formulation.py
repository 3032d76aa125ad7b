"""What a network was trained to say, and at which noise levels: the two things that are not in its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import Tensor

from sdxl_cli.diffusion.schedule import NoiseSchedule, sigma_table, signal_shares

Prediction = Literal["eps", "v", "x0"]
"""The noise, the velocity (arXiv 2202.00512), or the clean latent itself (one-step SDXL-Lightning)."""

WORDS: dict[Prediction, str] = {"eps": "the noise", "v": "v", "x0": "the clean latent"}

TERMINAL_SHARE = 4.8973451890853435e-08
"""ᾱ of the last level of a zero-terminal-SNR schedule. 0 would make sigma infinite; this is the value of A1111 and
ComfyUI, sigma 4518.76, at which x is noise but for two parts in ten thousand."""


def zero_terminal_sigmas() -> Tensor:
    """The noise levels moved so that the last one is pure noise (arXiv 2305.08891, Algorithm 1).

    sqrt(ᾱ) is shifted until its last value is 0 and stretched until its first is what it was.

    Returns:
        float32 [1000], ascending, 0.0292 … 4518.76.
    """
    roots = signal_shares().sqrt()
    first, last = roots[0], roots[-1]
    shares = ((roots - last) * (first / (first - last))).square()
    shares[-1] = TERMINAL_SHARE
    return ((1.0 - shares) / shares).sqrt().float()


@dataclass(frozen=True, slots=True)
class Formulation:
    """How a network has to be asked."""

    prediction: Prediction = "eps"
    zero_terminal_snr: bool = False
    """Trained down to pure noise; without it the last level still has 0.5 % of the picture's variance."""

    def schedule(self) -> NoiseSchedule:
        """The noise levels it was trained on."""
        return _schedule(self.zero_terminal_snr)

    def __str__(self) -> str:
        """In words: ``v, zero terminal SNR``."""
        return self.prediction + (", zero terminal SNR" if self.zero_terminal_snr else "")


@cache
def _schedule(zero_terminal: bool) -> NoiseSchedule:
    return NoiseSchedule(zero_terminal_sigmas() if zero_terminal else sigma_table())
