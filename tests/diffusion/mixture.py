"""A mixture of Gaussians in one dimension: its best denoiser, and where its probability flow leads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_cli.diffusion.samplers.base import Sampler
from tests.diffusion.peers import NoNoise

F64 = torch.float64
START, END = 14.6, 0.3


@dataclass(frozen=True)
class Mixture:
    weights: tuple[float, ...]
    means: tuple[float, ...]
    widths: tuple[float, ...]

    def parts(self, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, means, widths = (torch.tensor(v, dtype=F64) for v in (self.weights, self.means, self.widths))
        return weights, means, widths**2, widths**2 + sigma**2

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """E[clean | x]: each part's own, weighted by how likely x is of that part."""
        weights, means, clean, noisy = self.parts(sigma)
        away = x[..., None] - means
        share = (weights.log() - noisy.log() / 2 - away**2 / (2 * noisy)).softmax(-1)
        return (share * (means + away * clean / noisy)).sum(-1)

    def below(self, x: Tensor, sigma: float) -> Tensor:
        """The share of noisy samples below x."""
        weights, means, _, noisy = self.parts(sigma)
        return (weights * torch.erfc((means - x[..., None]) / (2 * noisy).sqrt()) / 2).sum(-1)

    def flow(self, x: Tensor, start: float, end: float) -> Tensor:
        """In one dimension nobody overtakes: the flow keeps the share of samples below x."""
        share, low, high = self.below(x, start), torch.full_like(x, -99), torch.full_like(x, 99)
        for _ in range(100):
            middle = (low + high) / 2
            left = self.below(middle, end) < share
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return (low + high) / 2


MIXTURE = Mixture((0.3, 0.5, 0.2), (-1.2, 0.3, 1.9), (0.35, 0.2, 0.5))


def even_in_log(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(math.log(start), math.log(end), n + 1, dtype=F64).exp()


def slow_start(start: float, end: float, n: int) -> Tensor:
    """Even in log sigma, but for the first steps, which grow from the square of the others."""
    whole = math.log(start / end)
    step = whole / n
    gaps = [step**2 / 2]
    while gaps[-1] * 1.6 < step:
        gaps.append(gaps[-1] * 1.6)
    rest = whole - sum(gaps)
    gaps += [rest / round(rest / step)] * round(rest / step)
    return start * torch.tensor([0.0, *gaps], dtype=F64).cumsum(0).neg().exp()


def errors_of(
    sampler: Sampler, grid: Callable[[float, float, int], Tensor], steps: tuple[int, ...]
) -> list[float]:
    x = torch.linspace(-25, 25, 11, dtype=F64)
    exact = MIXTURE.flow(x, START, END)
    found = []
    for n in steps:
        *_, end = sampler.steps(MIXTURE, x, grid(START, END, n), NoNoise())
        found.append(float((end - exact).norm()))
    return found


def order_of(sampler: Sampler, grid: Callable[[float, float, int], Tensor]) -> float:
    """log2 of how much smaller the error is with twice the steps."""
    coarse, fine = errors_of(sampler, grid, (160, 320))
    return math.log2(coarse / fine)
