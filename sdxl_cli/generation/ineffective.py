"""Settings that were given and change nothing, because of others."""

from __future__ import annotations

from collections.abc import Iterator

from sdxl_cli.diffusion.guidance import OFF
from sdxl_cli.generation.guidance_texts import CONSTANT
from sdxl_cli.generation.request import GenerateRequest


def ineffective(request: GenerateRequest, steps: int | None = None) -> Iterator[str]:
    """Say of each such setting what it would need.

    Args:
        request: as planned: its steps are those of the levels, where these were given one by one.
        steps: what the user gave as their number; None: nothing.
    """
    if steps not in (None, request.steps) and (request.sigmas is not None or request.timesteps is not None):
        flag = "--timesteps" if request.sigmas is None else "--sigmas"
        count = f"{request.steps} step{'' if request.steps == 1 else 's'}"
        yield f"--steps {steps} changes nothing beside {flag}, which make {count}; leave one out"
    if request.refiner is None and request.refiner_mode != "ensemble":
        yield f"--refiner-mode {request.refiner_mode} changes nothing without --refiner FILE"
    if request.negative_prompt and request.cfg_scale in OFF and request.cfg_schedule == CONSTANT:
        yield f"--negative-prompt changes nothing at --cfg-scale {request.cfg_scale:g}, which is no guidance"
    if request.prepack == "on" and (request.compile or request.vram == "low"):
        yield f"--prepack on changes nothing with {'--compile' if request.compile else '--vram low'}"
