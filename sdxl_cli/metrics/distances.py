"""FID, KID and Inception score from features that are there already; all sums in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SEED = 2020
"""What subsets and orders are drawn from; torch-fidelity's, whose draws these are."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS = 10


class Rows(Protocol):
    """Features, one row a picture, perhaps on disk."""

    def __len__(self) -> int:
        """Rows there are."""
        ...

    def take(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        """These rows [len(indices), D]."""
        ...


@dataclass(frozen=True, slots=True)
class Gaussian:
    """What FID keeps of a set of features."""

    mean: Tensor
    """[D], float64."""
    covariance: Tensor
    """[D, D], float64; divided by count - 1."""
    count: int | None
    """Pictures; None where a file does not say."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over parts of the data, and how much the parts differ."""

    mean: float
    std: float
    """Of the whole population of parts."""
    parts: int


def gaussian(parts: Iterable[Tensor]) -> Gaussian:
    """Mean and covariance of features that come in parts [n, D], of which one at a time is in memory.

    Raises:
        ValueError: fewer than two rows.
    """
    count, shift, total, products = 0, None, torch.tensor(0.0), torch.tensor(0.0)
    for part in parts:
        values = part.double()
        if shift is None:
            # sums of products around any point near the mean do not cancel
            shift = values.mean(dim=0)
            total, products = (
                torch.zeros_like(shift),
                torch.zeros(len(shift), len(shift), dtype=torch.float64),
            )
        centred = values - shift
        count += len(values)
        total += centred.sum(dim=0)
        products.addmm_(centred.T, centred)
    if shift is None or count < 2:
        raise ValueError(f"{count} rows have no covariance")
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
    return Gaussian(shift + mean, covariance, count)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), FID of two Gaussians (Heusel et al. 2017, equation 6).

    The trace of the root is the sum of the roots of the eigenvalues of C1^½ C2 C1^½, a symmetric matrix with the
    eigenvalues of C1 C2; what rounding makes negative counts as zero.
    """
    difference = one.mean - other.mean
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ other.covariance @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    return float(difference @ difference + traces - 2 * shared)


def kernel_distance(
    one: Rows, other: Rows, *, subsets: int = KID_SUBSETS, size: int = KID_SUBSET_SIZE, seed: int = SEED
) -> Spread:
    """KID: the squared maximum mean discrepancy under (x·y / D + 1)³, unbiased (Binkowski et al. 2018, section 3).

    Args:
        one, other: features.
        subsets: how many pairs of random subsets the mean is taken over.
        size: rows of a subset, at most as many as either has.
        seed: of numpy's RandomState, which draws the subsets of ``one`` and ``other`` in turn.

    Raises:
        ValueError: a subset would have more rows than there are, or fewer than two.
    """
    if not 2 <= size <= min(len(one), len(other)):
        raise ValueError(f"subsets of {size} from {len(one)} and {len(other)} rows")
    # the legacy generator is the point: torch-fidelity draws with it, so its subsets are the same
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = one.take(random.choice(len(one), size, replace=False)).double()
        y = other.take(random.choice(len(other), size, replace=False)).double()
        within = _off_diagonal(_cubic(x, x)) + _off_diagonal(_cubic(y, y))
        found.append(float(within / (size * (size - 1)) - 2 * _cubic(x, y).mean()))
    return _spread(found)


def inception_score(logits: Rows, *, splits: int = IS_SPLITS, seed: int = SEED) -> Spread:
    """exp of the mean divergence between a picture's classes and all pictures' (Salimans et al. 2016), over splits.

    Args:
        logits: of the classes, without the last layer's bias, as the authors' program has them.
        splits: parts that the pictures are dealt to after shuffling.
        seed: of the shuffling.

    Raises:
        ValueError: fewer pictures than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} pictures in {splits} splits")
    order = np.random.RandomState(seed).permutation(len(logits))
    bounds = [index * len(logits) // splits for index in range(splits + 1)]
    scores = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        log_p = logits.take(order[start:end]).double().log_softmax(dim=1)
        overall = log_p.exp().mean(dim=0, keepdim=True)
        scores.append(float((log_p.exp() * (log_p - overall.log())).sum(dim=1).mean().exp()))
    return _spread(scores)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal(kernel: Tensor) -> Tensor:
    return kernel.sum() - kernel.trace()


def _spread(values: list[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values)), len(values))
