"""Quantiles of the Beta distribution, which torch does not have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TERMS = 64
"""Of a series in powers of at most 1/2."""


def beta_quantile(shares: Tensor, a: float, b: float) -> Tensor:
    """x with I_x(a, b) = share, by bisection.

    Args:
        shares: float64, 0 … 1.
        a: above 0.
        b: above 0.

    Returns:
        float64 like shares, 0 … 1, to about 1e-15.
    """
    middle = _lower_part(torch.tensor(0.5, dtype=torch.float64), a, b)
    # from the nearer end, where the digits of a small x, or of a small 1 - x, are kept
    found = torch.where(shares <= middle, _solve(shares, a, b), 1 - _solve(1 - shares, b, a))
    # the middle of a symmetric one is exact, because it is rounded to an index: 499.5 must not become 499.4999
    return torch.where(shares == 0.5, 0.5, found) if a == b else found


def _solve(shares: Tensor, a: float, b: float) -> Tensor:
    """The x up to 1/2 for shares up to I_½(a, b); 1/2 for larger ones."""
    low, high = torch.zeros_like(shares), torch.full_like(shares, 0.5)
    for _ in range(64):
        middle = (low + high) / 2
        below = _lower_part(middle, a, b) < shares
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(shares <= 0, 0.0, (low + high) / 2)


def _lower_part(x: Tensor, a: float, b: float) -> Tensor:
    """I_x(a, b) for x up to 1/2: x^a / B(a, b) · sum of (1 - b)_k / k! · x^k / (a + k) (DLMF 8.17.7, 15.2.1)."""
    total, coefficient, power = torch.zeros_like(x), 1.0, torch.ones_like(x)
    for k in range(TERMS):
        total = total + coefficient / (a + k) * power
        coefficient *= (k + 1 - b) / (k + 1)
        power = power * x
    return x**a * total * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
