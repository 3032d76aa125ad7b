"""Numbers about pictures, on pictures for which they are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage, stats

from sdxl_cli.generation.picture import Pixels
from sdxl_cli.inspection.studies.measures import busiest, rank_correlation, repetition, sharpness, subject


def noise(size: tuple[int, int] = (64, 64), seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> Pixels:
    rows, columns = np.ogrid[: size[0], : size[1]]
    inside = (rows + 0.5 - centre[0]) ** 2 + (columns + 0.5 - centre[1]) ** 2 < radius**2
    return np.where(inside[..., None], np.array([200, 30, 30]), np.array([240, 240, 250])).astype(np.uint8)


def test_white_noise_has_its_power_evenly_and_blur_takes_the_fine_part_away() -> None:
    # of the square of frequencies, all but the disc of radius 1/4 is fine
    assert sharpness(noise((256, 256))) == pytest.approx(1 - math.pi / 16, abs=0.02)
    blurred = [
        sharpness(ndimage.gaussian_filter(noise((128, 128)), (sigma, sigma, 0))) for sigma in (0.5, 1, 2)
    ]
    assert 0.8 > blurred[0] > blurred[1] > blurred[2] > 0


@pytest.mark.parametrize(("cycles", "fine"), [(8, 0.0), (15, 0.0), (18, 1.0), (30, 1.0)])
def test_a_wave_is_fine_from_a_quarter_of_a_cycle_per_pixel(cycles: int, fine: float) -> None:
    wave = 128 + 100 * np.sin(2 * math.pi * cycles * np.arange(64) / 64)
    pixels = np.repeat(np.repeat(wave[None, :, None], 64, 0), 3, 2).astype(np.uint8)
    assert sharpness(pixels) == pytest.approx(fine, abs=0.2)


def test_brightness_and_flat_colour_are_no_detail() -> None:
    assert sharpness(np.full((32, 32, 3), 77, np.uint8)) == 0
    assert sharpness(noise() // 2) == pytest.approx(sharpness(noise() // 2 + 100), rel=1e-6)


def test_a_disc_is_where_it_was_drawn() -> None:
    found = subject(disc((100, 80), (30.0, 50.0), 12))
    assert (found.top, found.left) == (pytest.approx(0.30, abs=1e-3), pytest.approx(50 / 80, abs=1e-3))
    assert found.coverage == pytest.approx(math.pi * 144 / 8000, rel=0.02)
    assert found.cut == 0


def test_a_disc_that_is_cut_off_touches_the_border() -> None:
    assert subject(disc((100, 100), (50.0, 0.0), 20)).cut == pytest.approx(40 / 396, rel=0.15)


def test_where_nothing_stands_out_there_is_no_centre() -> None:
    found = subject(np.full((20, 20, 3), 9, np.uint8))
    assert (math.isnan(found.top), found.coverage, found.cut) == (True, 0, 0)


@pytest.mark.parametrize("turned", [False, True])
def test_two_of_the_same_repeat_and_one_does_not(turned: bool) -> None:
    one = disc((40, 120), (20.0, 30.0), 12)
    both = np.concatenate([one[:, :60], one[:, :60]], axis=1)
    shown = [np.swapaxes(pixels, 0, 1) if turned else pixels for pixels in (one, both)]
    assert repetition(shown[0]) < 0.1
    assert repetition(shown[1]) == pytest.approx(1)
    assert repetition(np.zeros((8, 32, 3), np.uint8)) == 0


@pytest.mark.parametrize("values", [(3.0, 1.0, 2.0, 9.0), (1.0, 1.0, 2.0, 0.5), (4.0, 3.0, 2.0, 1.0)])
def test_rank_correlation_is_spearmans(values: tuple[float, ...]) -> None:
    expected = stats.spearmanr((1, 2, 4, 8), values).statistic
    assert rank_correlation((1, 2, 4, 8), values) == pytest.approx(expected)
    assert math.isnan(rank_correlation((1, 2, 4, 8), (5, 5, 5, 5)))


def test_the_busiest_square_is_where_pictures_differ() -> None:
    first = noise((40, 60))
    second = first.copy()
    second[21:27, 33:39] = 0
    assert busiest(first, second, 6) == (21, 33)
