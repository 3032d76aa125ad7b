"""Many requests in one go: all of them settled before the first picture is made, each model loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.errors import SdxlError, UsageError
from sdxl_cli.generation.batchfile import Line
from sdxl_cli.generation.fewstep import FewSteps
from sdxl_cli.generation.ineffective import ineffective
from sdxl_cli.generation.pipeline import Models, Reporter
from sdxl_cli.generation.plan import Plan, plan_generation
from sdxl_cli.generation.request import GenerateRequest, require_prompts_fit, with_seed
from sdxl_cli.generation.session import open_weights
from sdxl_cli.generation.sizes import Size
from sdxl_cli.generation.sweep import Axis, combinations
from sdxl_cli.generation.values import changed

LIGHT_FIELDS = frozenset({
    "prompt", "negative_prompt", "prompt_2", "steps", "cfg_scale", "sampler", "scheduler", "seed", "original_size",
    "crop_top_left", "target_size", "aesthetic_score", "negative_original_size", "negative_crop_top_left",
    "negative_target_size", "negative_aesthetic_score", "refiner_switch_at", "size", "width", "height",
    "eta", "s_noise", "s_churn", "sigmas", "timesteps", "num_images", "batch_size", "prompt_syntax", "emphasis",
    "clip_skip", "strict_tokens", "embedding",
    "embeddings_dir", "init_img", "strength", "exact_steps", "resize_mode", "background", "mask",
    "invert_mask", "mask_blur", "mask_content", "only_masked", "mask_padding", "outpaint",
    "refiner_mode", "refiner_strength", "hires_scale", "hires_steps", "hires_denoising_strength", "hires_upscaler",
    "negative_prompt_2", "empty_negative", "cfg_rescale", "cfg_interval", "cfg_schedule", "adm_scale",
    "vae_tiling",
})  # fmt: skip
"""Fields that another value of needs no other weights. A field that is not listed makes a model load again: slow
when it need not have been, never wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request of several."""

    request: GenerateRequest
    stated: frozenset[str] = frozenset()
    """Fields that were given a value for this job, besides those for all."""
    where: str = ""
    """What to call it in errors and on grids, such as ``prompts.txt:3``; empty for the only one."""
    output: str | None = None
    """Where its pictures go, when that is said for it alone."""
    line: int = 0
    """Which prompt of a file it is, from 0."""
    cell: tuple[int, ...] = ()
    """Its place on each axis of a sweep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """A job about which nothing is open any more; nothing is loaded yet."""

    job: Job
    files: Sequence[ModelFiles]
    """Base and, when there is one, refiner."""
    plan: Plan
    models: Models


def expand(
    base: GenerateRequest, lines: Sequence[Line], axes: Sequence[Axis], seeded: bool = True
) -> list[Job]:
    """All jobs: every line of a prompt file, or the base request itself, with every combination of the sweeps.

    A random seed is drawn once per line, so that the pictures of a sweep differ by what is swept alone.

    Raises:
        UsageError: a line or a combination that is no request; of a file's lines, all of them are named.
    """
    starts = lines or [Line("", {})]
    jobs: list[Job] = []
    wrong: list[str] = []
    for index, line in enumerate(starts):
        try:
            request = changed(base, line.changes, line.where) if line.changes else base
            if not request.prompt and not any(axis.field == "prompt" for axis in axes):
                raise UsageError(f"{line.where or 'the command line'}: has no prompt")
            if seeded and axes:
                request = with_seed(request)
            stated = frozenset({*line.changes, *(axis.field for axis in axes if axis.field)})
            jobs += [
                Job(request=made, stated=stated, where=line.where, output=line.output, line=index, cell=cell)
                for cell, made in combinations(request, axes)
            ]
        except UsageError as error:
            wrong.append(str(error))
    if wrong:
        raise UsageError("; ".join(wrong))
    return jobs


class Workshop:
    """Settles jobs, and keeps their models from one to the next."""

    def __init__(
        self,
        locate: Callable[[GenerateRequest], list[ModelFiles]],
        buckets: Callable[[int], Sequence[Size]],
        report: Reporter,
        few_steps: FewSteps | None = None,
    ) -> None:
        """How to find a request's files, the trained sizes of a model of some native size, for ratios, and what
        becomes of requests for few-step models; None: nothing.
        """
        self._few_steps = few_steps
        self._locate, self._buckets, self._report = locate, buckets, report
        self._opened: dict[str, tuple[list[ModelFiles], Models]] = {}
        self._loaded: Models | None = None
        self._said: set[str] = set()

    def settle(self, job: Job) -> Settled:
        """Find the models of a job and decide everything about it.

        Raises:
            SdxlError: of any kind; the text begins with where the job comes from.
        """
        try:
            return self._settle(job)
        except SdxlError as error:
            raise type(error)(_told([job.where], str(error))) from error

    def _settle(self, job: Job) -> Settled:
        require_prompts_fit(job.request)
        files, models = self._open(job.request)
        request = job.request
        if self._few_steps is not None:
            request = self._few_steps(request, files, job.stated)
        configs = [model.config for model in files]
        buckets = self._buckets(configs[0].native_size) if request.size else ()
        plan = plan_generation(request, *configs, buckets=buckets, formulation=models.base.formulation)
        assert isinstance(plan.request, GenerateRequest)
        steps = None
        if self._few_steps is not None:
            self._few_steps.check(plan.request, files)
            steps = job.request.steps if self._few_steps.was_given("steps", job.stated) else None
        self._warn_of_ineffective(plan.request, steps)
        return Settled(job=replace(job, request=request), files=files, plan=plan, models=models)

    def _warn_of_ineffective(self, request: GenerateRequest, steps: int | None) -> None:
        for text in ineffective(request, steps):
            if text not in self._said:  # once, however many jobs there are
                self._said.add(text)
                self._report.warn(text)

    def settle_all(self, jobs: Iterable[Job]) -> list[Settled]:
        """Settle all jobs; those of one model follow each other, otherwise the order stays.

        Raises:
            SdxlError: a job is wrong; when several are, the text has each reason once.
        """
        settled: list[Settled] = []
        kind: type[SdxlError] = SdxlError
        wrong: dict[str, list[str]] = {}
        for job in jobs:
            try:
                settled.append(self._settle(job))
            except SdxlError as error:
                kind = kind if wrong else type(error)
                wrong.setdefault(str(error), []).append(job.where)
        if wrong:
            raise kind("; ".join(_told(places, reason) for reason, places in wrong.items()))
        order = {id(models): index for index, (_, models) in enumerate(self._opened.values())}
        return sorted(settled, key=lambda one: order[id(one.models)])

    def ready(self, settled: Settled) -> Models:
        """The models of a job; those of another one before it are let go."""
        if self._loaded is not None and self._loaded is not settled.models:
            self._loaded.forget()
        self._loaded = settled.models
        return settled.models

    def _open(self, request: GenerateRequest) -> tuple[list[ModelFiles], Models]:
        key = repr({name: value for name, value in asdict(request).items() if name not in LIGHT_FIELDS})
        if key not in self._opened:
            files = self._locate(request)
            weights = open_weights(files, request, self._report)
            models = Models(base=weights[0], refiner=weights[1] if len(weights) > 1 else None)
            self._opened[key] = (files, models)
        return self._opened[key]


def _told(places: Sequence[str], reason: str) -> str:
    """A reason after the first of the jobs that it holds for: ``prompts.txt:1 and 3 more: …``."""
    first = places[0]
    if not first or reason.startswith(first):
        return reason
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{first}{more}: {reason}"


def labelled(settled: Sequence[Settled], index: int) -> str:
    """What a note calls a job of several: ``[3/12] prompts.txt:3: ``; nothing for the only one."""
    if len(settled) == 1:
        return ""
    where = settled[index].job.where
    return f"[{index + 1}/{len(settled)}] " + (f"{where}: " if where else "")
