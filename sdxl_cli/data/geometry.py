"""Resize to cover, crop, flip: planned as numbers, and done from those numbers alone.

The plan is what a manifest keeps. Doing it is a pure function of the picture and the plan, so the recorded
``original_size`` and ``crop_top_left`` are those of the very pixels (paper section 2.2, Algorithm 1).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdxl_cli.data.buckets import Size

if TYPE_CHECKING:
    from PIL.Image import Image

CropPolicy = Literal["random", "center"]


@dataclass(frozen=True, slots=True)
class CropPlan:
    """What is done to a picture: resize, then mirror when ``flipped``, then cut out."""

    resized_size: Size
    """(height, width) after resizing; covers the target on both axes, and fits it on one."""
    scale: float
    """Resized over stored size; above 1 the picture was enlarged."""
    crop_top_left: tuple[int, int]
    """(top, left) in pixels of the resized picture, as the model sees it: after the mirror, if any."""
    target_size: Size
    """(height, width) of the bucket."""
    flipped: bool = False

    @property
    def crop_loss(self) -> float:
        """Share of the picture's area that the crop leaves out, 0..1."""
        return 1 - (self.target_size[0] * self.target_size[1]) / (self.resized_size[0] * self.resized_size[1])


def plan_crop(
    size: Size, bucket: Size, policy: CropPolicy, rng: random.Random, *, flipped: bool = False
) -> CropPlan:
    """Plan how a picture of ``size`` (height, width) fills ``bucket``.

    Args:
        size: of the stored, upright picture.
        bucket: the target.
        policy: ``random`` draws top and left uniformly from all whole pixels; ``center`` halves what is over.
        rng: read by ``random`` only.
        flipped: mirror left and right; the crop is planned in the mirrored picture.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
    room = (resized[0] - bucket[0], resized[1] - bucket[1])
    if policy == "center":
        top_left = (room[0] // 2, room[1] // 2)
    else:
        top_left = (rng.randint(0, room[0]), rng.randint(0, room[1]))
    return CropPlan(resized, scale, top_left, bucket, flipped)


def apply_crop(image: Image, plan: CropPlan) -> Image:
    """The pixels of ``plan``, from the upright RGB picture it was made for; same picture, same bits."""
    from PIL.Image import Resampling, Transpose

    height, width = plan.resized_size
    if image.size != (width, height):
        image = image.resize((width, height), Resampling.LANCZOS)
    if plan.flipped:
        image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
    top, left = plan.crop_top_left
    return image.crop((left, top, left + plan.target_size[1], top + plan.target_size[0]))
