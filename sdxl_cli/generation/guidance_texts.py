"""What people type about guidance: read and checked, without importing torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdxl_cli.diffusion.schedule import NoiseSchedule
    from sdxl_cli.generation.request import SamplingRequest

CONSTANT = "constant"
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2.0,
    "linear-up": lambda done: done,
    "cosine-up": lambda done: (1.0 - math.cos(math.pi * done)) / 2.0,
}
"""From the share of the run that is done, 0 at the first step and 1 at the last, to the share of cfg_scale - 1."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Noise levels with guidance."""

    low: float
    high: float
    in_sigma: bool
    """Whether the ends are sigmas; otherwise they are shares of the 1000 levels, 0 for no noise."""

    def sigmas(self, schedule: NoiseSchedule) -> tuple[float, float]:
        """(lo, hi): there is guidance where lo < sigma <= hi.

        Shares are cut as the refiner's is, by timestep: round(1000 · lo) <= t < round(1000 · hi). A sigma between
        two levels belongs to the nearest, the lower one on a tie, as for the network.
        """
        if self.in_sigma:
            return self.low, self.high
        first, end = (round(len(schedule.sigmas) * share) for share in (self.low, self.high))
        return _edge(schedule, first), _edge(schedule, end)


def _edge(schedule: NoiseSchedule, index: int) -> float:
    """The sigma half-way between the levels ``index - 1`` and ``index``."""
    if index == 0:
        return 0.0
    if index == len(schedule.sigmas):
        return math.inf
    return float(schedule.sigmas[index - 1 : index + 1].double().mean())


@dataclass(frozen=True, slots=True)
class Emphasized:
    """Fooocus' ADM guidance: the original sizes told to both sides at first, times a number."""

    positive: float
    negative: float
    share: float
    """Of the noise levels, from the highest down."""

    def above(self, schedule: NoiseSchedule) -> float:
        """The sigma above which it is in force: t > 999 · (1 - share)."""
        last = len(schedule.sigmas) - 1
        return _edge(schedule, math.floor(last * (1.0 - self.share)) + 1)


def parse_interval(text: str) -> Interval:
    """``0.2:0.8`` (shares of the noise levels) or ``sigma=0.28:5.42``.

    Raises:
        ValueError: it is neither, or empty.
    """
    body = text.removeprefix("sigma=")
    in_sigma = body != text
    ends = _numbers(body, ":")
    if ends is None or len(ends) != 2:
        raise ValueError(f"cfg_interval {text}: expected LO:HI such as 0.2:0.8, or sigma=0.28:5.42")
    low, high = ends
    if not in_sigma and high > 1:
        raise ValueError(f"cfg_interval {text}: shares are 0 to 1; for noise levels write sigma={text}")
    if not 0 <= low < high:
        raise ValueError(f"cfg_interval {text}: the first must be 0 or more, and below the second")
    return Interval(low, high, in_sigma)


def parse_emphasis(text: str) -> Emphasized:
    """``1.5:0.8:0.3``, as Fooocus names them: positive, negative, share.

    Raises:
        ValueError: not three numbers, or a share outside 0 … 1.
    """
    numbers = _numbers(text, ":")
    if numbers is None or len(numbers) != 3 or min(numbers) <= 0 or numbers[2] > 1:
        raise ValueError(
            f"adm_scale {text}: expected POSITIVE:NEGATIVE:SHARE such as 1.5:0.8:0.3, all above 0 and the share "
            "at most 1"
        )
    return Emphasized(*numbers)


def scales(text: str, cfg_scale: float, steps: int) -> list[float]:
    """The guidance scale of each step.

    Args:
        text: ``constant``, a name of the shapes, or a list ``7,5,3``. A shape goes between ``cfg_scale`` and 1; a
            list is spread evenly over the steps and linear in between.
        cfg_scale: what ``constant`` and the shapes go by.
        steps: how many.

    Raises:
        ValueError: the text is none of these.
    """
    shape = _SHAPES.get(text)
    if text == CONSTANT or shape:
        shares = [index / max(steps - 1, 1) for index in range(steps)]
        return [1.0 + (cfg_scale - 1.0) * shape(share) if shape else cfg_scale for share in shares]
    values = _numbers(text, ",")
    if values is None or min(values) < 0:
        names = ", ".join((CONSTANT, *_SHAPES))
        raise ValueError(f"cfg_schedule {text}: expected {names}, or scales such as 7,5,3 (0 or more)")
    return [_spread(values, index / max(steps - 1, 1)) for index in range(steps)]


def check(request: SamplingRequest) -> None:
    """Refuse texts about guidance that mean nothing.

    Raises:
        ValueError: names the field.
    """
    if not request.cfg_scale >= 0:
        raise ValueError(f"cfg_scale {request.cfg_scale}: must be 0 or more (1 is no guidance, and so is 0)")
    if not 0 <= request.cfg_rescale <= 1:
        raise ValueError(f"cfg_rescale {request.cfg_rescale}: must be 0 to 1 (0 is off; 0.7 is usual)")
    scales(request.cfg_schedule, request.cfg_scale, 1)
    if request.cfg_interval is not None:
        parse_interval(request.cfg_interval)
    if request.adm_scale is not None:
        parse_emphasis(request.adm_scale)


def _numbers(text: str, separator: str) -> list[float] | None:
    try:
        values = [float(part) for part in text.split(separator)]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def _spread(values: Sequence[float], share: float) -> float:
    """The value at a share of the way from the first to the last, linear in between."""
    place = share * (len(values) - 1)
    index = min(int(place), max(len(values) - 2, 0))
    after = values[min(index + 1, len(values) - 1)]
    return values[index] + (place - index) * (after - values[index])
