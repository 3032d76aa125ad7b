"""Numbers about a picture that need no network: how sharp it is, where its subject is, whether it repeats itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_cli.generation.picture import Pixels

Plane = NDArray[np.float64]
"""[H, W]."""

FINE = 0.25
"""Cycles per pixel above which detail is fine: half of the finest that pixels can show."""
_APART = 0.12
"""How far a colour is from the background's, as a share of the way from black to white, to be in the foreground."""


def luma(pixels: Pixels) -> Plane:
    """Brightness 0 … 1 by Rec. 709's weights."""
    return np.asarray(pixels.astype(np.float64) @ (0.2126, 0.7152, 0.0722) / 255)


def sharpness(pixels: Pixels) -> float:
    """Share of a picture's power that is in fine detail, 0 … 1: above a quarter of a cycle per pixel.

    The mean is taken off and a Hann window laid over first, so that neither brightness nor the jump between opposite
    borders counts. A picture without any power has 0. White noise has about 0.8.
    """
    plane = luma(pixels)
    height, width = plane.shape
    window = np.outer(np.hanning(height), np.hanning(width))
    spectrum = np.abs(np.fft.fft2((plane - plane.mean()) * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    total = spectrum.sum()
    return float(spectrum[radius > FINE].sum() / total) if total > 1e-12 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What stands out from the background."""

    top: float
    """Of its centre of mass, as a share of the height: 0.5 is the middle. NaN where nothing stands out."""
    left: float
    """Of its centre of mass, as a share of the width."""
    coverage: float
    """Share of the pixels, 0 … 1."""
    cut: float
    """Share of the border's pixels that it covers, 0 … 1: a subject that is whole touches little of it."""


def subject(pixels: Pixels) -> Subject:
    """Find what stands out from the most usual colour of the border.

    Meant for one subject on a plain ground; on a busy one most of the picture stands out.
    """
    colours = pixels.astype(np.float64) / 255
    height, width = colours.shape[:2]
    edge = max(1, min(height, width) // 50)
    border = np.ones((height, width), bool)
    border[edge:-edge, edge:-edge] = False
    ground = np.median(colours[border], axis=0)
    apart = np.sqrt(((colours - ground) ** 2).mean(axis=2))
    mask = apart > _APART
    weight = np.where(mask, apart, 0.0)
    total = weight.sum()
    rows, columns = (np.arange(n) + 0.5 for n in (height, width))
    return Subject(
        top=float((weight.sum(axis=1) * rows).sum() / total / height) if total else math.nan,
        left=float((weight.sum(axis=0) * columns).sum() / total / width) if total else math.nan,
        coverage=float(mask.mean()),
        cut=float(mask[border].mean()),
    )


def repetition(pixels: Pixels) -> float:
    """How much a picture looks like itself further along its longer side, -1 … 1.

    The largest correlation of brightness between the picture and itself moved by a quarter to three quarters of the
    side, where both overlap. Models asked for long formats like to show a subject twice. 0 where all is one colour.
    """
    plane = luma(pixels)
    plane = plane if plane.shape[1] >= plane.shape[0] else plane.T
    side = plane.shape[1]
    found = [
        _correlation(plane[:, :-shift], plane[:, shift:])
        for shift in range(side // 4, 3 * side // 4 + 1, max(1, side // 64))
    ]
    return max(found)


def _correlation(a: Plane, b: Plane) -> float:
    a, b = a - a.mean(), b - b.mean()
    lengths = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / lengths if lengths > 1e-9 else 0.0


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, -1 … 1; ties share their ranks. NaN where one of them is constant."""
    first, second = (_ranks(np.asarray(values, np.float64)) for values in (a, b))
    first, second = first - first.mean(), second - second.mean()
    lengths = math.sqrt(float((first * first).sum() * (second * second).sum()))
    return float((first * second).sum()) / lengths if lengths else math.nan


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    below = (values[:, None] > values[None]).sum(axis=1)
    same = (values[:, None] == values[None]).sum(axis=1)
    return np.asarray(below + (same - 1) / 2, np.float64)


def busiest(first: Pixels, second: Pixels, side: int) -> tuple[int, int]:
    """(top, left) of the square of ``side`` pixels in which two pictures differ most."""
    change = np.abs(luma(first) - luma(second))
    sums = np.pad(change, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    squares = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(int(squares.argmax()), squares.shape)
    return int(top), int(left)
