"""Bucket tables: the sizes that pictures are cropped to, and which of them fits a picture best."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Size = tuple[int, int]
"""(height, width), in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table by rule: for every long side, the longest short side that keeps within the area."""

    area: int
    """Pixels that no bucket has more of."""
    step: int = 64
    """Every side is a multiple of this; at least the model's 8 times what its U-Net halves."""
    min_side: int = 512
    max_side: int = 2048
    max_aspect: float = 4.0
    """Longest allowed ratio of the long side to the short one."""

    def __post_init__(self) -> None:
        if self.step < 1 or self.area < self.step**2 or self.max_aspect < 1:
            raise ValueError(f"no bucket has sides of {self.step} pixels and more within {self.area} pixels")
        if not self.sizes():
            raise ValueError(
                f"no size in steps of {self.step} from {self.min_side} to {self.max_side} fits {self.area} pixels"
            )

    def sizes(self) -> tuple[Size, ...]:
        """The table, widest first, both orientations."""
        found: set[Size] = set()
        first = math.ceil(self.min_side / self.step) * self.step
        for long in range(first, self.max_side + 1, self.step):
            short = min(long, self.area // long // self.step * self.step)
            if short >= self.min_side and long <= short * self.max_aspect:
                found |= {(short, long), (long, short)}
        # A square smaller than another is only the clamped end of the rule.
        squares = sorted(size for size in found if size[0] == size[1])
        return tuple(sorted(found - set(squares[:-1]), key=lambda s: (s[0] / s[1], s)))


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketConfig:
    """The sizes themselves, or the rule that makes them; exactly one of the two."""

    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) of every bucket."""
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if bool(self.sizes) == (self.grid is not None):
            raise ValueError("give either sizes, a list of [height, width], or a grid")
        wrong = [size for size in self.sizes if min(size) < 8 or size[0] % 8 or size[1] % 8]
        if wrong:
            raise ValueError(f"{wrong[0][0]}x{wrong[0][1]} is no bucket: sides are multiples of 8")

    def table(self) -> BucketTable:
        """The sizes, ready to choose from."""
        return BucketTable(self.grid.sizes() if self.grid else self.sizes)


@dataclass(frozen=True, slots=True)
class BucketTable:
    """Sizes, and the choice among them."""

    sizes: tuple[Size, ...]
    _logs: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_logs", tuple(math.log(h / w) for h, w in self.sizes))

    def nearest(self, size: Size) -> Size:
        """The bucket whose aspect ratio is nearest by logarithm, so that 2:1 and 1:2 are alike.

        Of several with the same ratio the largest one not larger than the picture wins, else the smallest.
        """
        aspect = math.log(size[0] / size[1])
        gap = min(abs(log - aspect) for log in self._logs)
        best = [s for s, log in zip(self.sizes, self._logs, strict=True) if abs(log - aspect) <= gap + 1e-9]
        fitting = [s for s in best if s[0] <= size[0] and s[1] <= size[1]]
        return max(fitting, key=_area) if fitting else min(best, key=_area)

    def fitting(self, size: Size, step: int) -> Size | None:
        """The nearest bucket when the picture covers it, else one of its own that needs no enlarging.

        Its own one has the picture's shape and at most the area of the nearest bucket, sides rounded down to
        ``step``; None when a side is shorter than that.
        """
        bucket = self.nearest(size)
        if size[0] >= bucket[0] and size[1] >= bucket[1]:
            return bucket
        shrink = min(1.0, math.sqrt(_area(bucket) / _area(size)))
        height, width = (int(side * shrink) // step * step for side in size)
        return (height, width) if height and width else None

    def aspect_error(self, size: Size) -> float:
        """How far the nearest bucket's aspect ratio is, as ``|log|``; 0 is the same shape."""
        height, width = self.nearest(size)
        return abs(math.log(height / width) - math.log(size[0] / size[1]))


def _area(size: Size) -> int:
    return size[0] * size[1]
