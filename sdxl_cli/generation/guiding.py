"""What a run is guided by, from what was asked for and the noise levels it walks through."""

from __future__ import annotations

import math

from torch import Tensor

from sdxl_cli.diffusion.guidance import Guidance
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.generation.guidance_texts import CONSTANT, parse_interval, scales
from sdxl_cli.generation.request import SamplingRequest


def settle(request: SamplingRequest, schedule: NoiseSchedule, sigmas: Tensor) -> Guidance:
    """The guidance of a run.

    Args:
        request: what was asked for.
        schedule: the noise levels of the model that starts.
        sigmas: the noise levels walked through, descending [n + 1]; a schedule goes along these.
    """
    levels = [level for level in sigmas.tolist() if level > 0]
    curve: tuple[tuple[float, float], ...] = ()
    if request.cfg_schedule != CONSTANT:
        steps = zip(levels, scales(request.cfg_schedule, request.cfg_scale, len(levels)), strict=True)
        curve = tuple(steps)
    interval = parse_interval(request.cfg_interval).sigmas(schedule) if request.cfg_interval else None
    return Guidance(
        scale=request.cfg_scale,
        curve=curve,
        interval=interval or (0.0, math.inf),
        rescale=request.cfg_rescale,
    )


def describe(request: SamplingRequest, schedule: NoiseSchedule, sigmas: Tensor) -> str:
    """In a few words: ``cfg 5``, ``cfg 7→1 in 18 of 30 steps, t=795→233, rescale 0.7``, ``cfg off``.

    Arguments are those of :func:`settle`.
    """
    guidance = settle(request, schedule, sigmas)
    levels = [level for level in sigmas.tolist() if level > 0]
    guided = [level for level in levels if guidance.scale_at(level) != 1.0]
    if not guided:
        return "cfg off"
    first, last = guidance.scale_at(guided[0]), guidance.scale_at(guided[-1])
    words = f"cfg {first:.3g}→{last:.3g}" if guidance.curve else f"cfg {first:g}"
    if len(guided) < len(levels):
        ends = "→".join(str(schedule.index_of(level)) for level in dict.fromkeys((guided[0], guided[-1])))
        words += f" in {len(guided)} of {len(levels)} steps, t={ends}"
    return words + (f", rescale {guidance.rescale:g}" if guidance.rescale else "")
