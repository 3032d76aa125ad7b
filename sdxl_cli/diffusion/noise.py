"""Random numbers: one stream per image, on the CPU, so that neither device nor batch size changes a picture."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

MANTISSA_BITS = 23
"""Of a single precision number: how often an octave of noise levels is halved."""


class NoiseStreams:
    """Independent standard normal noise for each image of a batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._trees = [BrownianTree(seed) for seed in seeds]

    def next(self, shape: Sequence[int]) -> Tensor:
        """The next noise of every image.

        Args:
            shape: of one image, (C, h, w).

        Returns:
            float32 [B, C, h, w] on the CPU.
        """
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators])

    def fresh(self, x: Tensor) -> Tensor:
        """The next noise of every image, like x [B, C, h, w] in shape, type and place."""
        return _like(self.next(x.shape[1:]), x)

    def between(self, x: Tensor, sigma: float, following: float) -> Tensor:
        """What each image's Brownian path does between two noise levels, as noise of unit variance.

        Asking again gives the same; parts of a path add up to the whole.

        Args:
            x: says shape [B, C, h, w], type and place.
            sigma: a noise level above 0.
            following: another.
        """
        return _like(torch.stack([tree.between(x.shape[1:], sigma, following) for tree in self._trees]), x)


class BrownianTree:
    """A Brownian path W over the noise levels, of which any stretch can be had without the others.

    A virtual Brownian tree (arXiv 2001.01328, section 4) whose branches are the digits of a single precision
    number: W grows by an independent amount over each octave [2^k, 2^(k+1)], and inside an octave the mantissa's
    bits say which half of the Brownian bridge to enter next. So two levels that differ as float32 never meet in
    one leaf, and no largest or smallest level has to be known before.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._shape: tuple[int, ...] = ()
        self._points: OrderedDict[float, Tensor] = OrderedDict()

    def between(self, shape: Sequence[int], sigma: float, following: float) -> Tensor:
        """(W(higher) - W(lower)) / sqrt(higher - lower): standard normal.

        Args:
            shape: of the noise.
            sigma: a noise level above 0.
            following: another one, which differs in single precision.

        Returns:
            float32 of that shape, on the CPU.
        """
        if tuple(shape) != self._shape:
            self._shape, self._points = tuple(shape), OrderedDict()
        low, high = sorted((_single(sigma), _single(following)))
        assert 0 < low < high, f"no path between the noise levels {sigma} and {following}"
        moved = self._inside(high) - self._inside(low)
        for octave in range(_octave(low), _octave(high)):
            moved = moved + self._across(octave)
        return moved / math.sqrt(high - low)

    def _inside(self, sigma: float) -> Tensor:
        """W(sigma) - W(2^k), where 2^k is the start of sigma's octave."""
        if sigma not in self._points:
            self._points[sigma] = self._bridge(sigma)
            # a step begins where the one before ended
            while len(self._points) > 3:
                self._points.popitem(last=False)
        return self._points[sigma]

    def _bridge(self, sigma: float) -> Tensor:
        octave = _octave(sigma)
        width = 2.0**octave
        bits = int((sigma / width - 1) * 2**MANTISSA_BITS)
        left, right = torch.zeros(self._shape), self._across(octave)
        for depth in range(MANTISSA_BITS):
            rest = MANTISSA_BITS - depth
            if bits % 2**rest == 0:
                break
            # halfway along a bridge of length L: the mean of the ends, and a variance of L / 4
            middle = (left + right) / 2 + self._draw(octave, depth, bits >> rest) * math.sqrt(width / 4)
            upper = bits >> (rest - 1) & 1
            left, right, width = (middle, right, width / 2) if upper else (left, middle, width / 2)
        return left

    def _across(self, octave: int) -> Tensor:
        """W(2^(k+1)) - W(2^k)."""
        return self._draw(octave) * math.sqrt(2.0**octave)

    def _draw(self, *branch: int) -> Tensor:
        """The standard normal noise that belongs to a branch, whenever it is asked for."""
        name = f"{self._seed} {branch}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)
        return torch.randn(self._shape, generator=torch.Generator("cpu").manual_seed(seed))


def _like(noise: Tensor, x: Tensor) -> Tensor:
    # from pinned memory, so that the CPU goes on to the next step while the device still works on this one
    source = noise.pin_memory() if x.device.type == "cuda" else noise
    return source.to(x.device, x.dtype, non_blocking=True)


def _single(level: float) -> float:
    """Rounded to single precision, as tables of noise levels are."""
    return float(struct.unpack("f", struct.pack("f", level))[0])


def _octave(level: float) -> int:
    """k of the [2^k, 2^(k+1)) that a level is in."""
    return math.frexp(level)[1] - 1
