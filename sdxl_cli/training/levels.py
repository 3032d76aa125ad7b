"""Which noise levels a step trains on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sdxl_cli.diffusion.formulation import Formulation
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.draws import Streams


@dataclass(frozen=True, slots=True)
class Levels:
    """Noise levels of a batch, on the CPU."""

    sigma: Tensor
    """[B]."""
    time: Tensor
    """What the network is told: the index, or ln(sigma) / 4 with continuous levels [B]."""
    index: Tensor
    """The index, or the nearest one, for reports and weights [B], 0 … 999."""


Density = Callable[[UNetTrainConfig, int, torch.Generator], Tensor]
"""Numbers in 0 … 1, one per sample: how much noise."""


def _logit_normal(config: UNetTrainConfig, count: int, generator: torch.Generator) -> Tensor:
    return (torch.randn(count, generator=generator) * config.logit_std + config.logit_mean).sigmoid()


def _mode(config: UNetTrainConfig, count: int, generator: torch.Generator) -> Tensor:
    """arXiv 2403.03206, equation 20."""
    u = torch.rand(count, generator=generator)
    return 1 - u - config.mode_scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


DENSITIES: dict[str, Density] = {"logit_normal": _logit_normal, "mode": _mode}
"""Those that are not uniform."""


class Drawing:
    """Draws noise levels as a configuration says."""

    def __init__(self, config: UNetTrainConfig) -> None:
        self.config = config
        self.sigmas = Formulation(config.prediction, config.zero_terminal_snr).schedule().sigmas

    def draw(self, count: int, generator: torch.Generator) -> Levels:
        """``count`` of them at random."""
        config = self.config
        if config.objective == "edm":
            logs = torch.randn(count, generator=generator) * config.edm_std + config.edm_mean
            return self._continuous(logs)
        low, high = config.timestep_min, config.timestep_max
        if config.timestep_sampling == "uniform":
            return self._discrete(torch.randint(low, high + 1, (count,), generator=generator))
        share = DENSITIES[config.timestep_sampling](config, count, generator)
        return self._discrete(low + (share * (high - low + 1)).long().clamp(0, high - low))

    def draw_each(self, streams: Streams) -> Levels:
        """One of each picture's own stream."""
        drawn = [self.draw(1, stream) for stream in streams]
        return Levels(*(torch.cat([getattr(one, f.name) for one in drawn]) for f in fields(Levels)))

    def spread(self, shares: Tensor) -> Levels:
        """The levels at these shares, 0 … 1 [B], of what can be drawn: the same ones every time, for validation."""
        config = self.config
        if config.objective == "edm":
            quantiles = torch.special.ndtri(shares.double().clamp(1e-4, 1 - 1e-4)).float()
            return self._continuous(quantiles * config.edm_std + config.edm_mean)
        low, high = config.timestep_min, config.timestep_max
        return self._discrete(low + (shares * (high - low + 1)).long().clamp(0, high - low))

    def _discrete(self, index: Tensor) -> Levels:
        return Levels(self.sigmas[index], index, index)

    def _continuous(self, logs: Tensor) -> Levels:
        nearest = (self.sigmas.log()[None] - logs[:, None]).abs().argmin(dim=1)
        return Levels(logs.exp(), logs / 4, nearest)
