"""Settings that were given and change nothing, because of others."""

from __future__ import annotations

from collections.abc import Iterator

from sdxl_cli.diffusion.guidance import OFF
from sdxl_cli.generation.guidance_texts import CONSTANT
from sdxl_cli.generation.request import GenerateRequest


def ineffective(request: GenerateRequest) -> Iterator[str]:
    """Say of each such setting what it would need."""
    if request.refiner is None and request.refiner_mode != "ensemble":
        yield f"--refiner-mode {request.refiner_mode} changes nothing without --refiner FILE"
    if request.negative_prompt and request.cfg_scale in OFF and request.cfg_schedule == CONSTANT:
        yield f"--negative-prompt changes nothing at --cfg-scale {request.cfg_scale:g}, which is no guidance"
