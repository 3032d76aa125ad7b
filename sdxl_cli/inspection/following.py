"""A generation under the lamp: what x, the denoised latents and the noise are after every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from sdxl_cli.console import get as console
from sdxl_cli.errors import NumericError
from sdxl_cli.generation.autoencode import decode
from sdxl_cli.generation.encode import encode_prompts, guided
from sdxl_cli.generation.observe import Step
from sdxl_cli.generation.pipeline import Models, generate
from sdxl_cli.generation.plan import Plan
from sdxl_cli.generation.preview import LatentColours, fit_colours
from sdxl_cli.generation.sizes import format_size
from sdxl_cli.generation.weights import Weights
from sdxl_cli.inspection.audit import Audit, audit_unet
from sdxl_cli.inspection.findings import Followed, FollowedStep, Values
from sdxl_cli.inspection.latents import Findings, look_at
from sdxl_cli.inspection.sheets import ROWS, Sheet, Strip, fitted
from sdxl_cli.inspection.subject import spread

T = TypeVar("T")
AUDITED = 6
"""Noise levels at which a U-Net is watched."""


class _Follower:
    """Looks at every step; keeps the latents of all of them, which are small."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def note(self, text: str) -> None:
        """See :class:`~sdxl_cli.generation.pipeline.Reporter`."""
        console().note(text)

    def warn(self, text: str) -> None:
        """See :class:`~sdxl_cli.generation.pipeline.Reporter`."""
        console().warn(text)

    def progress(self, items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
        """See :class:`~sdxl_cli.generation.pipeline.Reporter`."""
        return console().progress(items, description, total=total)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See :class:`~sdxl_cli.generation.observe.Observer`."""
        yield

    def step(self, step: Step) -> None:
        """See :class:`~sdxl_cli.generation.observe.Observer`."""
        self.steps.append(
            Step(
                step.denoised.float().cpu(), step.who, step.done, step.total, step.x.float().cpu(), step.sigma
            )
        )


def follow(plan: Plan, models: Models, *, audit_autoencoder: bool, audit_network: bool) -> Findings:
    """Make the picture of a plan and measure every step on the way.

    A generation that ends in NaN is told of up to the step before.

    Args:
        plan: of one picture.
        models: who makes it.
        audit_autoencoder: whether to watch the decoder's layers.
        audit_network: whether to watch the U-Net's.
    """
    watcher = _Follower()
    stopped = None
    try:
        for _ in generate(plan, models, watcher):
            pass
    except NumericError as error:
        stopped = str(error)
        console().warn(stopped)
    if not watcher.steps:
        raise NumericError(stopped or "no step was made")
    steps = watcher.steps
    audits = (_audit(plan, models, steps),) if audit_network else ()
    models.release()
    colours = fit_colours(models.base.vae())
    sheet = Sheet.of("steps", [_strip(plan, models.base, step, colours) for step in _shown(steps)], "")
    followed = Followed(
        prompt=plan.request.prompt,
        seed=plan.request.seed,
        size=format_size(plan.framing.size),
        plan=plan.split(),
        sampler=plan.sampler.label,
        guidance=plan.guidance,
        steps=tuple(_numbers(plan, steps)),
        stopped=stopped,
    )
    final = [("the finished latents", steps[-1].denoised[0])]
    name = models.base.records("base")["base"].name
    found = look_at(final, models.base.vae(), name, followed=followed, audit=audit_autoencoder)
    report = replace(found.report, audits=(*found.report.audits, *audits))
    return replace(found, report=report, sheets=(sheet, *found.sheets))


def audit_levels(weights: Weights, plan: Plan, latents: Sequence[Tensor]) -> Audit:
    """Watch a U-Net at noise levels spread over all of them, on noised latents.

    Args:
        weights: the model.
        plan: of any picture, for what the model is told.
        latents: scaled [1, z, h, w] of one size.
    """
    sigmas = weights.formulation.schedule().sigmas
    last = len(sigmas) - 1
    places = [round(last * (1 - part / (AUDITED - 1))) for part in range(AUDITED)]
    points = []
    for number, place in enumerate(places):
        latent = latents[number % len(latents)]
        noise = torch.randn(latent.shape, generator=torch.Generator("cpu").manual_seed(number))
        sigma = float(sigmas[place])
        points.append((f"t={place}", (latent + sigma * noise).to(weights.device), sigma))
    return _watched(weights, plan, points)


def _audit(plan: Plan, models: Models, steps: Sequence[Step]) -> Audit:
    mine = [step for step in steps if step.who == "base"]
    picked = [mine[i] for i in sorted(spread(len(mine), AUDITED))]
    device = models.base.device
    points = [(f"t={_index(plan, s)}", s.x.to(device), s.sigma) for s in picked]
    return _watched(models.base, plan, points)


@torch.inference_mode()
def _watched(weights: Weights, plan: Plan, points: Sequence[tuple[str, Tensor, float]]) -> Audit:
    prompts = encode_prompts(plan.request, weights)
    weights.release()
    unet = weights.unet()
    denoise = guided(weights, prompts, plan.framing, plan.request, plan.sigmas, 1)
    return audit_unet(unet, denoise, points)


def _shown(steps: Sequence[Step]) -> list[Step]:
    """A few steps, the last always among them."""
    count = len(steps)
    return [steps[count - 1 - index] for index in sorted(spread(count, ROWS), reverse=True)]


def _index(plan: Plan, step: Step) -> int:
    return plan.schedule.index_of(step.sigma)


@torch.inference_mode()
def _strip(plan: Plan, weights: Weights, step: Step, colours: LatentColours, side: int = 256) -> Strip:
    label = f"step {step.done} of {step.total}, {step.who}, t={_index(plan, step)}, sigma {step.sigma:.3f}"
    # as the network sees it: brought to deviation 1
    noisy = step.x / math.sqrt(step.sigma**2 + 1)
    linear = (Image.fromarray(colours(part[:1])) for part in (step.denoised, noisy))
    whole = Image.fromarray(decode(step.denoised[:1], weights))
    return Strip(label, tuple(fitted(image, side) for image in (whole, *linear)))


def _numbers(plan: Plan, steps: Sequence[Step]) -> Iterator[FollowedStep]:
    before: Tensor | None = None
    for step in steps:
        change = None
        if before is not None and before.shape == step.denoised.shape:
            change = float((step.denoised - before).double().square().mean().sqrt())
        yield FollowedStep(
            step=step.done,
            who=step.who,
            timestep=_index(plan, step),
            sigma=step.sigma,
            expected_std=math.sqrt(step.sigma**2 + 1),
            x=values(step.x),
            denoised=values(step.denoised),
            eps=values(step.eps),
            change=change,
        )
        before = step.denoised


def values(latents: Tensor) -> Values:
    """The numbers of latents [B, z, h, w]; NaN where nothing is finite."""
    flat = latents.double().transpose(0, 1).flatten(1)
    parts = [row[torch.isfinite(row)] for row in (*flat, flat)]
    means = [float(part.mean()) if part.numel() else math.nan for part in parts]
    stds = [float(part.std(correction=0)) if part.numel() else math.nan for part in parts]
    whole = parts[-1]
    return Values(
        mean=means[-1],
        std=stds[-1],
        minimum=float(whole.min()) if whole.numel() else math.nan,
        maximum=float(whole.max()) if whole.numel() else math.nan,
        non_finite=flat.numel() - whole.numel(),
        channel_means=tuple(means[:-1]),
        channel_stds=tuple(stds[:-1]),
    )
