"""The ways of n steps through the noise levels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdxl_cli.diffusion.quantile import beta_quantile
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.errors import UsageError

Grid = Callable[..., Tensor]
"""A schedule and a number of steps n -> float32 [n + 1] noise levels, descending, the last one 0.

What is keyword-only may be set by users: ``--scheduler karras:rho=5``. ``ddim_uniform`` and ``beta`` are the grids of
ComfyUI, which for some n have a step more or fewer.
"""


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


def karras(
    schedule: NoiseSchedule,
    n: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """Even in sigma^(1/rho) (arXiv 2206.00364, eq. 5)."""
    low, high = (level ** (1 / rho) for level in _ends(schedule, sigma_min, sigma_max))
    return _ended((high + torch.linspace(0, 1, n, dtype=torch.float64) * (low - high)) ** rho)


def exponential(
    schedule: NoiseSchedule, n: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """Even in log sigma (k-diffusion)."""
    low, high = (math.log(level) for level in _ends(schedule, sigma_min, sigma_max))
    return _ended(torch.linspace(high, low, n, dtype=torch.float64).exp())


def polyexponential(
    schedule: NoiseSchedule,
    n: int,
    *,
    rho: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """log sigma falls as ramp^rho, ramp even from 1 to 0 (k-diffusion); with rho = 1 it is ``exponential``."""
    low, high = (math.log(level) for level in _ends(schedule, sigma_min, sigma_max))
    ramp = torch.linspace(1, 0, n, dtype=torch.float64) ** rho
    return _ended((low + ramp * (high - low)).exp())


def kl_optimal(
    schedule: NoiseSchedule, n: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """Even in arctan sigma (arXiv 2404.14507, eq. 17; n levels and then 0, as ComfyUI)."""
    low, high = (math.atan(level) for level in _ends(schedule, sigma_min, sigma_max))
    return _ended(torch.linspace(high, low, n, dtype=torch.float64).tan())


def simple(schedule: NoiseSchedule, n: int) -> Tensor:
    """Every 1000/n-th level from the top, truncated (ComfyUI "simple")."""
    size = _size(schedule, n)
    back = (torch.arange(n, dtype=torch.float64) * (size / n)).long()
    return _ended(schedule.sigmas[size - 1 - back])


def ddim_uniform(schedule: NoiseSchedule, n: int) -> Tensor:
    """Every (1000 // n)-th level from index 1 up (ComfyUI "ddim_uniform", A1111 "DDIM").

    Where n does not divide 1000 that can be more than n levels: 31 for n = 30.
    """
    size = _size(schedule, n)
    return _ended(schedule.sigmas[torch.arange(min(1, size - 1), size, size // n)].flip(0))


def beta(schedule: NoiseSchedule, n: int, *, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Indices at even quantiles of the Beta distribution (arXiv 2407.12173), rounded (ComfyUI "beta").

    It is dense at both ends, so that for large n some indices are the same, and taken once.
    """
    size = _size(schedule, n)
    shares = 1 - torch.arange(n, dtype=torch.float64) / n
    indices = torch.round(beta_quantile(shares, alpha, beta) * (size - 1)).long()
    return _ended(schedule.sigmas[torch.unique_consecutive(indices)])


ALIGNED = (
    14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141,
    0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582,
)  # fmt: skip
"""Align Your Steps' ten steps for SDXL (arXiv 2404.14507 and its project page; digits as in ComfyUI)."""


def align_your_steps(schedule: NoiseSchedule, n: int) -> Tensor:
    """The optimised levels, interpolated in log sigma for other n than 10; the last of n + 1 becomes 0."""
    table = torch.tensor(ALIGNED, dtype=torch.float64).log()
    places = torch.linspace(0, len(table) - 1, n + 1, dtype=torch.float64)[:-1]
    low = places.long()
    levels = (table[low] + (places - low) * (table[low + 1] - table[low])).exp()
    # the first is the table's top whatever model it is for
    return _ended(levels.clamp(max=schedule.sigma_max))


def lcm(schedule: NoiseSchedule, n: int) -> Tensor:
    """n of the 50 levels that latent consistency models are distilled at, 999, 979 … 19 (diffusers LCMScheduler)."""
    distilled, skip = 50, len(schedule.sigmas) // 50
    if n > distilled:
        raise UsageError(
            f"--steps {n}: the lcm scheduler has {distilled} levels; give --steps 4, or --scheduler sgm"
        )
    chosen = distilled - (torch.arange(n, dtype=torch.float64) * (distilled / n)).long()
    return _ended(schedule.sigmas[chosen * skip - 1])


GRIDS: dict[str, Grid] = {
    grid.__name__: grid
    for grid in (
        sgm,
        sgm_uniform,
        normal,
        trailing,
        leading,
        karras,
        exponential,
        polyexponential,
        simple,
        ddim_uniform,
        beta,
        kl_optimal,
        align_your_steps,
        lcm,
    )
}
"""Grids by name, as ``--scheduler`` takes them."""


def grid_options(grid: Grid) -> dict[str, float | None]:
    """What users may set of a grid, with the usual values; None is the model's own."""
    parameters = inspect.signature(grid).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def given_sigmas(schedule: NoiseSchedule, levels: Sequence[float]) -> Tensor:
    """The levels of ``--sigmas``, descending; a 0 at the end may be left out.

    Raises:
        UsageError: no level, one that does not descend, or one above what the model knows.
    """
    positive = list(levels[:-1] if levels and levels[-1] == 0 else levels)
    if not positive or min(positive) <= 0 or not all(map(math.isfinite, positive)):
        raise UsageError("--sigmas: give noise levels above 0, such as 14.6,6.3,2.2,0.9,0.4,0.1")
    if any(b >= a for a, b in zip(positive, positive[1:], strict=False)):
        raise UsageError("--sigmas: every noise level must be smaller than the one before")
    if positive[0] > schedule.sigma_max * 1.01:
        raise UsageError(f"--sigmas {positive[0]:g}: this model knows noise up to {schedule.sigma_max:.4f}")
    return _ended(torch.tensor(positive, dtype=torch.float64))


def given_timesteps(schedule: NoiseSchedule, timesteps: Sequence[float]) -> Tensor:
    """The levels of ``--timesteps``, descending from 999 at most; between two of the 1000, linear in log sigma.

    Raises:
        UsageError: no timestep, one that does not descend, or one the schedule does not have.
    """
    last = len(schedule.sigmas) - 1
    if not timesteps or not all(0 <= t <= last for t in timesteps):
        raise UsageError(f"--timesteps: give numbers from {last} down to 0, such as 999,749,499,249")
    if any(b >= a for a, b in zip(timesteps, timesteps[1:], strict=False)):
        raise UsageError("--timesteps: every timestep must be smaller than the one before")
    return _ended(schedule.at(torch.tensor(timesteps, dtype=torch.float64)))


def _ends(schedule: NoiseSchedule, low: float | None, high: float | None) -> tuple[float, float]:
    """The smallest and the largest level of a grid."""
    ends = schedule.sigma_min if low is None else low, schedule.sigma_max if high is None else high
    if not 0 < ends[0] < ends[1]:
        raise UsageError(
            f"--scheduler: sigma_min {ends[0]:g} must be above 0 and below sigma_max {ends[1]:g}"
        )
    return ends
