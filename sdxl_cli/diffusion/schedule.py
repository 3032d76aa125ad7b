"""The noise levels SDXL was trained on, and the n-step grids through them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdxl_cli.errors import UsageError

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


Grid = Callable[[NoiseSchedule, int], Tensor]
"""A schedule and a number of steps n -> float32 [n + 1] noise levels, descending, the last one 0."""


def _ended(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas.float(), torch.zeros(1)])


def _size(schedule: NoiseSchedule, n: int) -> int:
    """The number of noise levels, of which a grid that only picks cannot pick more."""
    size = len(schedule.sigmas)
    if n > size:
        raise UsageError(
            f"--steps {n}: this scheduler picks among {size} noise levels; "
            f"give --steps {size} or fewer, or --scheduler karras"
        )
    return size


def sgm(schedule: NoiseSchedule, n: int) -> Tensor:
    """The original's grid: indices int(linspace(999, 0, n, endpoint excluded)); for n = 10: 999, 899 … 99."""
    last = _size(schedule, n) - 1
    # numpy.linspace's arithmetic, start + i · step, so that every index truncates as the original's does
    indices = last + torch.arange(n, dtype=torch.float64) * (-last / n)
    return _ended(schedule.sigmas[indices.long()])


def sgm_uniform(schedule: NoiseSchedule, n: int) -> Tensor:
    """The same without truncating: 999, 899.1 … 99.9 (A1111 and ComfyUI "SGM Uniform")."""
    return _ended(schedule.at(torch.linspace(len(schedule.sigmas) - 1, 0, n + 1, dtype=torch.float64)[:-1]))


def normal(schedule: NoiseSchedule, n: int) -> Tensor:
    """Evenly spaced from the largest index down to 0 (A1111 "Uniform", ComfyUI "normal")."""
    return _ended(schedule.at(torch.linspace(len(schedule.sigmas) - 1, 0, n, dtype=torch.float64)))


def trailing(schedule: NoiseSchedule, n: int) -> Tensor:
    """Indices round(1000 - 1000 i / n) - 1 (diffusers "trailing")."""
    size = _size(schedule, n)
    # numpy.arange's arithmetic: where n is a multiple of 16, halves round as they do there
    step = (size - size / n) - size
    indices = size + torch.arange(n, dtype=torch.float64) * step
    return _ended(schedule.sigmas[torch.round(indices).long() - 1])


def leading(schedule: NoiseSchedule, n: int) -> Tensor:
    """Indices (n - 1 - i) · (1000 // n) + 1: the released scheduler_config (diffusers "leading", offset 1).

    The offset is left out where it would lead past the last level, which is at n = 1000 only.
    """
    size = _size(schedule, n)
    indices = torch.arange(n - 1, -1, -1) * (size // n)
    return _ended(schedule.sigmas[indices + min(1, size - 1 - int(indices[0]))])


def karras(schedule: NoiseSchedule, n: int) -> Tensor:
    """Even in sigma^(1/7) (arXiv 2206.00364, eq. 5)."""
    rho = 7.0
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = schedule.sigma_min ** (1 / rho), schedule.sigma_max ** (1 / rho)
    return _ended((high + ramp * (low - high)) ** rho)


def exponential(schedule: NoiseSchedule, n: int) -> Tensor:
    """Even in log sigma (k-diffusion)."""
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    return _ended(torch.linspace(high, low, n, dtype=torch.float64).exp())


GRIDS: dict[str, Grid] = {
    "sgm": sgm,
    "sgm_uniform": sgm_uniform,
    "normal": normal,
    "trailing": trailing,
    "leading": leading,
    "karras": karras,
    "exponential": exponential,
}
"""Grids by name, as ``--scheduler`` takes them."""

ALIASES = {"uniform": "normal", "discrete": "normal"}


def resolve(name: str) -> Grid:
    """The grid of that name.

    Raises:
        UsageError: no such grid; names the nearest.
    """
    key = name.strip().lower().replace(" ", "_").replace("-", "_")
    key = ALIASES.get(key, key)
    if key in GRIDS:
        return GRIDS[key]
    near = difflib.get_close_matches(key, [*GRIDS, *ALIASES], n=3, cutoff=0.4) or list(GRIDS)
    raise UsageError(f"--scheduler {name!r} is unknown; did you mean {', '.join(near)}?")
