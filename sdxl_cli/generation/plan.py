"""What will be run for a request, before any network is loaded: sampler, noise levels, who does which step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, pairwise
from typing import Literal

from torch import Tensor

from sdxl_cli.diffusion.formulation import Formulation
from sdxl_cli.diffusion.grids import sgm
from sdxl_cli.diffusion.samplers.base import Sampler
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.canvas import Canvas, open_canvas
from sdxl_cli.generation.guiding import describe
from sdxl_cli.generation.levels import settle
from sdxl_cli.generation.request import (
    Framing,
    GenerateRequest,
    MaskContent,
    RefineRequest,
    SamplingRequest,
    with_seed,
)
from sdxl_cli.generation.sizes import Size, format_size, nearest_multiple
from sdxl_cli.model.config import ModelConfig

Expert = Literal["base", "refiner"]
"""Who does steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A request with everything settled."""

    request: SamplingRequest
    """With seed, and the names of sampler and scheduler as this program spells them."""
    framing: Framing
    sampler: Sampler
    schedule: NoiseSchedule
    sigmas: Tensor
    """Noise levels walked through, descending [n + 1]; the last is 0."""
    base_steps: int
    """How many of the n steps the base does; the refiner does the others."""
    canvas: Canvas | None = None
    """The picture to start from; None: noise alone."""
    after: tuple[Plan, ...] = ()
    """Passes that follow, each from the latents of the one before, enlarged where its size is another."""

    @property
    def passes(self) -> tuple[Plan, ...]:
        """This one and those that follow."""
        return self, *self.after

    @property
    def steps(self) -> int:
        """How many steps are run; fewer than asked for when only the last part of a schedule is."""
        return len(self.sigmas) - 1

    @property
    def mask_content(self) -> MaskContent:
        """What the repainted part starts from."""
        request = self.request
        return request.mask_content if isinstance(request, GenerateRequest) else "original"

    @property
    def timesteps(self) -> list[int]:
        """The index 0 … 999 that the network is told at each step."""
        return [self.schedule.index_of(sigma) for sigma in self.sigmas[:-1].tolist()]

    @property
    def guidance(self) -> str:
        """Guidance in a few words: ``cfg 5 in 18 of 30 steps, t=795→233``."""
        return describe(self.request, self.schedule, self.sigmas)

    def steps_of(self, name: Expert) -> int:
        """How many of this pass's steps an expert does."""
        return self.base_steps if name == "base" else self.steps - self.base_steps

    def share(self) -> str:
        """How many of the steps are run: ``17 of 30 steps``."""
        if isinstance(self.request, GenerateRequest) and self.request.exact_steps:
            return f"exactly {self.steps} steps"
        return f"{self.steps} of {self.request.steps} steps"

    def split(self) -> str:
        """Who does which steps: ``base: 24 steps t=999→233 | refiner: 6 steps t=199→33``.

        Further passes come after ``then``, with their size where it is another.
        """
        shares = {"base": self.timesteps[: self.base_steps], "refiner": self.timesteps[self.base_steps :]}
        texts = [" | ".join(f"{name}: {_walk(steps)}" for name, steps in shares.items() if steps)]
        for before, then in pairwise(self.passes):
            larger = then.framing.size != before.framing.size
            texts.append(f"{format_size(then.framing.size)}, {then.split()}" if larger else then.split())
        return " | then ".join(texts)


def plan_generation(
    request: GenerateRequest,
    config: ModelConfig,
    refiner: ModelConfig | None = None,
    *,
    buckets: Sequence[Size] = (),
    formulation: Formulation | None = None,
) -> Plan:
    """Settle a request for a model, and read the picture it starts from.

    Args:
        request: as the user asked.
        config: the base model's sizes.
        refiner: the refiner's sizes, when there is one.
        buckets: (height, width) the model was trained on, for ratios; its square is always among them.
        formulation: how the base was trained; default: to predict the noise at the released levels.

    Raises:
        FileError: a picture is missing or none.
        UsageError: a size, a sampler or a scheduler that does not exist, or a strength that leaves no step.
    """
    schedule = (formulation or Formulation()).schedule()
    levels = settle(request, schedule)
    models = [config] if refiner is None else [config, refiner]
    multiple = size_multiple(*models)
    native = nearest_multiple((config.native_size, config.native_size), multiple)
    framing = request.framing(native, buckets=[native, *buckets], multiple=multiple)
    asked = framing.size if request.asks_size else None
    canvas = open_canvas(request, multiple=multiple, native=native, size=asked)
    if canvas is not None:
        framing = request.frame(canvas.size)
    sigmas = lowest(levels.grid, levels.steps, request.share_of_noise, exact=request.exact_steps)
    named = levels.named(request)
    first = Plan(
        request=named.fixed(asked or framing.size),
        canvas=canvas,
        framing=framing,
        sampler=levels.sampler,
        schedule=schedule,
        sigmas=sigmas,
        base_steps=len(sigmas) - 1,
    )
    return with_passes(first, named, levels.grid, multiple, has_refiner=refiner is not None)


def with_passes(
    first: Plan,
    request: GenerateRequest,
    grid: Callable[[int], Tensor],
    multiple: int,
    *,
    has_refiner: bool,
) -> Plan:
    """Add what comes after the first pass of a base: the larger one, and the refiner's share or pass.

    As an ensemble the refiner does the end of the last pass only: what comes before is noise for it anyhow.

    Args:
        first: the base's pass.
        request: what was asked for.
        grid: number of steps -> noise levels.
        multiple: what the sides must be multiples of.
        has_refiner: whether there is one.
    """
    passes = [first]
    if request.hires_scale is not None:
        height, width = (side * request.hires_scale for side in first.framing.size)
        size = nearest_multiple((round(height), round(width)), multiple)
        steps = request.hires_steps or request.steps
        sigmas = lowest(grid, steps, request.hires_denoising_strength, exact=True)
        larger = replace(first, canvas=None, framing=request.frame(size), sigmas=sigmas)
        passes.append(replace(larger, base_steps=larger.steps))
    last = passes[-1]
    if has_refiner and request.refiner_mode == "ensemble":
        cut = steps_above(NoiseSchedule(), last.sigmas, request.refiner_switch_at)  # the refiner's own levels
        passes[-1] = replace(last, base_steps=cut)
    elif has_refiner:
        # on the grid of `sdxl refine`, whatever the base's: 0.3 of a Karras grid would begin at t=53, of this at t=266
        own = NoiseSchedule()
        share = request.refiner_strength or 0.3
        sigmas = lowest(partial(sgm, own), request.steps, share, flag="--refiner-strength")
        passes.append(replace(last, canvas=None, schedule=own, sigmas=sigmas, base_steps=0))
    return replace(passes[0], after=tuple(passes[1:]))


def plan_refinement(request: RefineRequest, size: Size, formulation: Formulation | None = None) -> Plan:
    """Settle the refinement of a picture of ``size`` (height, width): only the last steps are run.

    ``formulation`` is how the model was trained; default: to predict the noise at the released levels.

    Raises:
        UsageError: a sampler or scheduler that does not exist, or a strength that leaves no step.
    """
    schedule = (formulation or Formulation()).schedule()
    # the refiner knows the lowest levels only, which the original's grid does not crowd
    levels = settle(request, schedule, otherwise="sgm")
    sigmas = lowest(levels.grid, levels.steps, request.strength)
    return Plan(
        request=with_seed(levels.named(request)),
        framing=request.frame(size),
        sampler=levels.sampler,
        schedule=schedule,
        sigmas=sigmas,
        base_steps=0,
    )


def lowest(
    grid: Callable[[int], Tensor], steps: int, share: float, *, exact: bool = False, flag: str = "--strength"
) -> Tensor:
    """The noise levels of the last part of a schedule.

    The rule is the original's: of n + 1 levels, 0 included, the lowest int(share · (n + 1)) are kept, which is one
    step less than that (sgm Img2ImgDiscretizationWrapper).

    Args:
        grid: number of steps n -> about n + 1 levels, descending.
        steps: of the whole schedule; with ``exact``, of the part that is kept.
        share: 0 … 1.
        exact: take a schedule so fine that ``steps`` of it are kept.
        flag: what gave ``share``, for the error.

    Raises:
        UsageError: no step is left.
    """
    levels = grid(steps)
    kept = len(levels) if exact else int(share * len(levels))
    if kept < 2:
        raise UsageError(
            f"{flag} {share:g} of {len(levels) - 1} steps leaves none to run; "
            f"give at least {flag} {_ceil_hundredths(2 / len(levels)):g}, or more steps"
        )
    if exact:
        levels = grid(next(n for n in count(steps) if int(share * (n + 1)) >= kept))
    return levels[-kept:]


def steps_above(schedule: NoiseSchedule, sigmas: Tensor, switch_at: float) -> int:
    """How many steps begin at or above the timestep where the refiner takes over.

    The cut is by timestep, not by step: 0.8 leaves it the 200 levels it was trained on,
    on any grid.
    """
    cut = round(len(schedule.sigmas) * (1 - switch_at))
    return sum(schedule.index_of(sigma) >= cut for sigma in sigmas[:-1].tolist())


def size_multiple(*configs: ModelConfig) -> int:
    """What both sides of a picture must be multiples of: one latent, in pixels."""
    return max(config.vae.downsampling for config in configs)


def _walk(steps: Sequence[int]) -> str:
    return f"{len(steps)} step{'' if len(steps) == 1 else 's'} t={steps[0]}→{steps[-1]}"


def _ceil_hundredths(value: float) -> float:
    return -(-value * 100 // 1) / 100
