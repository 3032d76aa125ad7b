from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from sdxl_cli.data.geometry import apply_crop, plan_crop
from tests.data.pictures import noise

SIZES = [(37, 91), (512, 512), (300, 200), (1000, 40), (64, 96), (65, 97), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("policy", ["random", "center"])
def test_the_resized_picture_covers_the_bucket_and_fits_it_on_one_side(
    size: tuple[int, int], policy: str
) -> None:
    for seed in range(20):
        plan = plan_crop(size, (64, 96), policy, random.Random(seed))  # type: ignore[arg-type]
        over = [r - t for r, t in zip(plan.resized_size, plan.target_size, strict=True)]
        assert min(over) == 0
        assert all(0 <= c <= o for c, o in zip(plan.crop_top_left, over, strict=True))
        assert plan.scale == max(64 / size[0], 96 / size[1])


def test_random_crops_reach_both_ends() -> None:
    lefts = {plan_crop((64, 100), (64, 96), "random", random.Random(s)).crop_top_left[1] for s in range(200)}
    assert lefts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("flipped", [False, True])
def test_a_crop_without_resizing_is_the_very_pixels(flipped: bool) -> None:
    image = noise(120, 96)
    plan = plan_crop((120, 96), (64, 96), "random", random.Random(3), flipped=flipped)
    top, left = plan.crop_top_left
    whole = np.asarray(image)[:, ::-1] if flipped else np.asarray(image)
    assert top > 0
    assert np.array_equal(np.asarray(apply_crop(image, plan)), whole[top : top + 64, left : left + 96])


def test_crop_top_left_is_counted_in_the_mirrored_picture() -> None:
    """A mirrored crop at left L shows what lies at resized width - target width - L of the upright picture."""
    image = noise(64, 130)
    plan = plan_crop((64, 130), (64, 96), "random", random.Random(1), flipped=True)
    left = plan.crop_top_left[1]
    mirror = 130 - 96 - left
    assert left != mirror
    expected = np.asarray(image)[:, mirror : mirror + 96][:, ::-1]
    assert np.array_equal(np.asarray(apply_crop(image, plan)), expected)


def test_resizing_is_pillows_lanczos_of_the_whole_picture() -> None:
    image = noise(200, 340)
    plan = plan_crop((200, 340), (64, 96), "center", random.Random(0))
    height, width = plan.resized_size
    top, left = plan.crop_top_left
    whole = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(apply_crop(image, plan)), whole[top : top + 64, left : left + 96])


def test_crop_loss_is_the_share_cut_off() -> None:
    assert plan_crop((128, 96), (64, 96), "center", random.Random(0)).crop_loss == 0.5
