"""From a network that predicts noise (or v) to a denoiser D(x; sigma) that predicts the clean latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sdxl_cli.diffusion.schedule import NoiseSchedule

Prediction = Literal["eps", "v"]

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(scaled latents [B, C, h, w], indices [B], crossattn [B, T, ctx], vector [B, adm]) -> prediction."""


def input_scale(sigma: Tensor) -> Tensor:
    """c_in = 1 / sqrt(sigma² + 1): makes the network's input unit variance (facts: sgm denoiser_scaling.py)."""
    return (sigma.square() + 1.0).rsqrt()


def to_denoised(prediction: Prediction, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent that a network output stands for: D = c_skip · x + c_out · output.

    eps: c_skip 1, c_out -sigma. v: c_skip 1 / (sigma² + 1), c_out -sigma / sqrt(sigma² + 1)
    (facts: sgm EpsScaling and VScaling).

    Args:
        prediction: what the network predicts.
        output: network output [B, C, h, w].
        x: noisy latent, not scaled [B, C, h, w].
        sigma: noise level, broadcastable to x.
    """
    if prediction == "eps":
        return x - sigma * output
    return x / (sigma.square() + 1.0) - sigma * input_scale(sigma) * output


class Denoiser:
    """The discrete denoiser: sigma goes to the nearest of the 1000 levels first (sgm DiscreteDenoiser)."""

    def __init__(self, network: Network, schedule: NoiseSchedule, prediction: Prediction = "eps") -> None:
        self.network = network
        self.schedule = schedule
        self.prediction: Prediction = prediction

    def __call__(self, x: Tensor, sigma: float, crossattn: Tensor, vector: Tensor) -> Tensor:
        """D(x; sigma).

        Args:
            x: noisy latents, fp32 [B, C, h, w], x = clean + sigma · noise.
            sigma: noise level.
            crossattn: [B, T, ctx] in the network's dtype.
            vector: [B, adm] in the network's dtype.

        Returns:
            Denoised latents, fp32 [B, C, h, w].
        """
        index = self.schedule.index_of(sigma)
        # stays on the CPU, as a scalar operand: copied over, every step would wait for the device
        level = self.schedule.sigmas[index]
        indices = torch.full((len(x),), index, dtype=torch.long, device=x.device)
        scaled = (x * input_scale(level)).to(crossattn.dtype)
        output = self.network(scaled, indices, crossattn, vector).to(x.dtype)
        return to_denoised(self.prediction, output, x, level)
