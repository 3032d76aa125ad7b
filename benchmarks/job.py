"""What both sides are asked to do, and the numbers they do it with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdxl_cli.bench.cases import TOKENS
from sdxl_cli.bench.setting import noise
from sdxl_cli.diffusion.schedule import NoiseSchedule

PROMPT = "a photograph of an astronaut riding a horse"
CFG = 5.0
LEVEL = 500
"""The noise level of a step, of 0 … 999."""

Kind = Literal["unet", "decode", "encode", "text", "image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One piece of work."""

    folder: str
    """Of the weights, as diffusers lays them out."""
    kind: Kind
    height: int
    width: int
    batch: int = 1
    steps: int = 2
    """Of a whole picture."""
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    negative: bool = False
    """With features for the negative prompt; without, they are zeros, as the released base has them."""

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Job:
        return cls(**json.loads(text))


def sigma() -> float:
    """Of the step that is timed."""
    return float(NoiseSchedule().sigmas[LEVEL])


def latents(job: Job, channels: int = 4) -> Tensor:
    """Standard normal [B, 4, h, w], fp32."""
    return noise(job.batch, channels, job.height // 8, job.width // 8)


def picture(job: Job) -> Tensor:
    """[B, 3, H, W] in -1 … 1, fp32."""
    return noise(job.batch, 3, job.height, job.width).clamp(-1, 1)


def text(width: int, pooled: int, job: Job) -> dict[str, tuple[Tensor, Tensor]]:
    """Features of one prompt by side: crossattn [1, 77, width] and pooled [1, pooled], fp32."""
    made = {"positive": (noise(1, TOKENS, width, seed=1), noise(1, pooled, seed=2))}
    if job.negative:
        made["negative"] = (noise(1, TOKENS, width, seed=3), noise(1, pooled, seed=4))
    else:
        made["negative"] = tuple(torch.zeros_like(part) for part in made["positive"])  # type: ignore[assignment]
    return made


def relative(found: Any, reference: Any) -> float:
    """|found - reference| / |reference|, of all numbers together."""
    a, b = (torch.as_tensor(values).double() for values in (found, reference))
    return float((a - b).norm() / b.norm())
