"""Times, and what may be said from a few of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ENOUGH = 6
"""Rounds from which on an interval is drawn by resampling; with fewer it is simply the smallest and the largest."""
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Sample:
    """One run."""

    seconds: float
    cpu_seconds: float
    """Of all threads of this process: on a machine that others use too, steadier than seconds on the wall."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A few numbers in three."""

    median: float
    low: float
    high: float
    count: int


def timed(work: Callable[[], object], device: torch.device) -> Sample:
    """Run ``work`` once and wait until the device is done with it."""
    wait(device)
    start, cpu = time.perf_counter(), time.process_time()
    work()
    wait(device)
    return Sample(time.perf_counter() - start, time.process_time() - cpu)


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of at least one number."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times longer ``theirs`` took, from rounds in which both ran one after the other.

    The interval is of the median over the rounds: 95 % of 2000 resamples (percentile bootstrap) from
    :data:`ENOUGH` rounds on, the smallest and the largest with fewer.

    Args:
        ours: seconds of each round.
        theirs: seconds of the same rounds.
    """
    rounds = [their / our for our, their in zip(ours, theirs, strict=True)]
    if len(rounds) < ENOUGH:
        return spread(rounds)
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(rounds, k=len(rounds))) for _ in range(_RESAMPLES))
    low, high = (medians[int(share * (_RESAMPLES - 1))] for share in (0.025, 0.975))
    return Spread(statistics.median(rounds), low, high, len(rounds))
