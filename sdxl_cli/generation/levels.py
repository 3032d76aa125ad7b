"""From the names in a request to a sampler and the noise levels it walks through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from sdxl_cli.diffusion.grids import given_sigmas, given_timesteps
from sdxl_cli.diffusion.names import Choice, NamedGrid, find_grid, find_sampler, is_auto
from sdxl_cli.diffusion.samplers.base import Sampler
from sdxl_cli.diffusion.samplers.tcd import TCD
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.request import SamplingRequest

Request = TypeVar("Request", bound=SamplingRequest)

CUSTOM = "custom"
"""What a picture says of its scheduler when the levels were given one by one."""


@dataclass(frozen=True, slots=True)
class Levels:
    """A sampler and its way down."""

    sampler: Sampler
    grid: Callable[[int], Tensor]
    """A number of steps n -> float32 [n + 1], descending, the last 0.

    Raises:
        UsageError: the scheduler does not have so many, or the levels were given one by one and are not so many.
    """
    steps: int
    """How many are asked for."""
    sampler_name: str
    """As this program spells it, with the options that the name gave; those of flags have their own place."""
    scheduler: str

    def named(self, request: Request) -> Request:
        """The request with names and steps as they are here."""
        return replace(request, sampler=self.sampler_name, scheduler=self.scheduler, steps=self.steps)


def settle(request: SamplingRequest, schedule: NoiseSchedule, *, otherwise: str | None = None) -> Levels:
    """The sampler and the whole way through the noise that a request asks for.

    Args:
        request: sampler and scheduler in any spelling; ``auto`` is the scheduler that the sampler's name says
            ("DPM++ 2M Karras"), else ``otherwise``, else the one that suits the sampler.
        schedule: the model's noise levels.
        otherwise: a scheduler's name.

    Raises:
        UsageError: a name that does not exist, an option that the sampler or scheduler does not have, two
            schedulers at once, or levels that do not descend.
    """
    flags = {"eta": request.eta, "s_noise": request.s_noise, "s_churn": request.s_churn}
    choice = find_sampler(request.sampler, flags)
    name = str(find_sampler(request.sampler))
    sampler = choice.sampler
    if isinstance(sampler, TCD):
        sampler = replace(sampler, schedule=schedule)
    if request.sigmas is not None or request.timesteps is not None:
        given = _given(request, choice, schedule)
        return Levels(sampler, partial(_only, given), len(given) - 1, name, CUSTOM)
    grid = _grid(request, choice, otherwise)
    through = _skipping(grid, schedule) if sampler.skips_penultimate else partial(grid, schedule)
    return Levels(sampler, through, request.steps, name, str(grid))


def _only(given: Tensor, steps: int) -> Tensor:
    if steps != len(given) - 1:
        raise UsageError(
            f"--sigmas or --timesteps: they are {len(given) - 1} steps, and {steps} are needed; name a --scheduler"
        )
    return given


def _skipping(grid: NamedGrid, schedule: NoiseSchedule) -> Callable[[int], Tensor]:
    """One level more, without the last above 0."""

    def through(steps: int) -> Tensor:
        levels = grid(schedule, steps + 1)
        return torch.cat([levels[:-2], levels[-1:]])

    return through


def _grid(request: SamplingRequest, choice: Choice, otherwise: str | None) -> NamedGrid:
    if is_auto(request.scheduler):
        return choice.grid or find_grid(otherwise or choice.sampler.grid)
    if request.scheduler == CUSTOM:
        raise UsageError("--scheduler custom: give the noise levels with --sigmas or --timesteps")
    grid = find_grid(request.scheduler)
    if choice.grid is not None and choice.grid.name != grid.name:
        raise UsageError(
            f"--sampler {request.sampler!r} says {choice.grid.name}, --scheduler says {grid.name}; leave one out"
            " or say --scheduler auto"
        )
    return grid


def _given(request: SamplingRequest, choice: Choice, schedule: NoiseSchedule) -> Tensor:
    if request.sigmas is not None and request.timesteps is not None:
        raise UsageError("--sigmas and --timesteps say the same thing twice; leave one out")
    if choice.grid is not None or not (is_auto(request.scheduler) or request.scheduler == CUSTOM):
        raise UsageError("--sigmas and --timesteps take the place of a scheduler; leave --scheduler out")
    if request.sigmas is not None:
        return given_sigmas(schedule, _numbers(request.sigmas, "--sigmas"))
    assert request.timesteps is not None
    return given_timesteps(schedule, _numbers(request.timesteps, "--timesteps"))


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").strip("[] ").split()]
    except ValueError as error:
        raise UsageError(f"{flag} {text!r}: give numbers with commas between") from error
