"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_cli.diffusion.denoiser import Denoiser


@dataclass(frozen=True, slots=True)
class Guided:
    """A denoiser pulled away from the negative condition and towards the positive one."""

    denoiser: Denoiser
    crossattn: tuple[Tensor, Tensor]
    """Negative and positive text features, each [B, T, ctx]."""
    vector: tuple[Tensor, Tensor]
    """Negative and positive conditioning vectors, each [B, adm]."""
    cfg_scale: float
    """1 is no guidance, and then the negative side is not computed."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """D_neg + scale · (D_pos - D_neg), both sides in one batch, negative first (facts: sgm VanillaCFG).

        Args:
            x: noisy latents [B, C, h, w].
            sigma: noise level.
        """
        if self.cfg_scale == 1.0:
            return self.denoiser(x, sigma, self.crossattn[1], self.vector[1])
        both = self.denoiser(torch.cat([x, x]), sigma, torch.cat(self.crossattn), torch.cat(self.vector))
        negative, positive = both.chunk(2)
        return negative + self.cfg_scale * (positive - negative)
