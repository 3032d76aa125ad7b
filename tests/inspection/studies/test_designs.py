"""Which pictures a study makes, and what it concludes from pictures for which that is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.inspection.studies.base import About, PictureStudy, StudyRequest
from sdxl_cli.inspection.studies.conditions import CropStudy, SizeStudy
from sdxl_cli.inspection.studies.formats import AspectStudy, RefinerStudy
from tests.inspection.studies.test_measures import disc, noise

BUCKETS = ((512, 2048), (768, 1344), (1024, 1024), (1344, 768), (2048, 512))
ABOUT = About(native=1024, buckets=BUCKETS, multiple=8)
BASE = GenerateRequest(prompt="", seed=5, refiner="r")


def asked(**changes: object) -> StudyRequest:
    return StudyRequest(study="x", output=Path("out"), prompts=("a", "b"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("study", [SizeStudy(), CropStudy(), RefinerStudy()], ids=lambda study: study.name)
def test_pictures_of_a_row_differ_by_their_column_alone(study: PictureStudy) -> None:
    design = study.design(asked(seeds=2), BASE, ABOUT)
    assert design.rows == ("a, seed 5", "a, seed 6", "b, seed 5", "b, seed 6")
    places = {(c, r) for c in range(len(design.columns)) for r in range(4)}
    assert {frame.place for frame in design.frames} == places
    for row, (prompt, seed) in enumerate((("a", 5), ("a", 6), ("b", 5), ("b", 6))):
        requests = [frame.request for frame in design.frames if frame.place[1] == row]
        assert {(r.prompt, r.seed) for r in requests} == {(prompt, seed)}
        assert len(set(requests)) == len(design.columns)
        assert {(r.size, r.steps, r.cfg_scale) for r in requests} == {(BASE.size, BASE.steps, BASE.cfg_scale)}


def first_row(study: PictureStudy) -> list[GenerateRequest]:
    return [f.request for f in study.design(asked(), BASE, ABOUT).frames if f.place[1] == 0]


def test_sizes_reach_from_an_eighth_of_the_models_to_twice_as_much() -> None:
    told = [request.original_size for request in first_row(SizeStudy())]
    assert told == ["128x128", "256x256", "512x512", "1024x1024", "2048x2048"]


def test_crops_are_of_left_of_top_and_of_both() -> None:
    assert [r.crop_top_left for r in first_row(CropStudy())] == ["0,0", "0,512", "512,0", "512,512"]


def test_the_refiner_is_asked_in_two_ways_and_left_out_in_one() -> None:
    ways = [(r.refiner, r.refiner_mode) for r in first_row(RefinerStudy())]
    assert ways == [(None, "ensemble"), ("r", "ensemble"), ("r", "sdedit")]


def test_formats_run_from_the_widest_to_the_tallest_and_come_from_the_buckets() -> None:
    design = AspectStudy().design(asked(values=("all",)), BASE, ABOUT)
    sizes = [frame.request.size for frame in design.frames][:5]
    assert sizes == ["2048x512", "1344x768", "1024x1024", "768x1344", "512x2048"]
    assert design.captions[0] == "a: 2048x512, 4.00"
    assert len(design.columns) * len(design.rows) >= len(design.frames) == 10
    few = AspectStudy().design(asked(), BASE, ABOUT).frames
    assert {frame.request.size for frame in few} == set(sizes)


@pytest.mark.parametrize(
    ("study", "value"), [(SizeStudy(), "big"), (CropStudy(), "10"), (AspectStudy(), "1000x1000px")]
)
def test_values_that_are_none_are_refused_by_the_name_of_their_flag(study: PictureStudy, value: str) -> None:
    with pytest.raises(UsageError, match="--values"):
        study.design(asked(values=(value,)), BASE, ABOUT)


def blurred(sigma: float, seed: int) -> Pixels:
    return ndimage.gaussian_filter(noise((64, 64), seed), (sigma, sigma, 0))


def test_a_model_that_obeys_the_size_is_told_from_one_that_does_not() -> None:
    study = SizeStudy()
    design = study.design(asked(values=("64x64", "256x256", "1024x1024")), BASE, ABOUT)
    obeys = {(c, r): blurred(2.0 - 0.8 * c, r) for c in range(3) for r in range(2)}
    numbers = study.measure(obeys, design).numbers
    assert numbers["rank_correlation"] == pytest.approx(1)
    assert numbers["gain"] > 10
    ignores = {(c, r): blurred(1.0, r) for c in range(3) for r in range(2)}
    numbers = study.measure(ignores, design).numbers
    assert numbers["gain"] == pytest.approx(1)
    assert math.isnan(numbers["rank_correlation"])  # all the same


def test_a_subject_that_moves_against_the_crop_is_told_with_its_sign() -> None:
    study = CropStudy()
    design = study.design(asked(), BASE, ABOUT)
    away = ((50, 50), (50, 30), (30, 50), (30, 30))
    pictures = {(c, r): disc((100, 100), away[c], 15) for c in range(4) for r in range(2)}
    outcome = study.measure(pictures, design)
    assert outcome.numbers["shift_against_crop"] == pytest.approx(20, abs=0.3)
    assert outcome.table[1][1:3] == ("0.0 ± 0.0", "-20.0 ± 0.0")
    mirrored = {at: pixels[::-1, ::-1] for at, pixels in pictures.items()}
    assert study.measure(mirrored, design).numbers["shift_against_crop"] == pytest.approx(-20, abs=0.3)


def test_what_a_refiner_adds_is_measured_and_enlarged_where_it_adds_most() -> None:
    study = RefinerStudy()
    design = study.design(asked(), BASE, ABOUT)
    soft = blurred(1.5, 0)
    refined = soft.copy()
    refined[24:40, 24:40] = noise((16, 16), 1)
    pictures = {(c, r): (soft, refined, soft)[c] for c in range(3) for r in range(2)}
    numbers = study.measure(pictures, design).numbers
    assert numbers["ensemble_gain"] > 2
    assert numbers["sdedit_gain"] == 1
    shown, cells = study.extra(pictures, design)
    assert len(shown.columns) == 6
    np.testing.assert_array_equal(cells[4, 0][::4, ::4], refined[24:40, 24:40])


def test_pictures_that_show_a_subject_twice_are_told_by_format() -> None:
    study = AspectStudy()
    design = study.design(asked(values=("1024x1024", "2048x512")), BASE, ABOUT)
    one = disc((60, 60), (30, 30), 14)
    long = np.concatenate([one[:30, :60], one[:30, :60]], axis=1)
    pictures = {f.place: one if f.request.size == "1024x1024" else long for f in design.frames}
    numbers = study.measure(pictures, design).numbers
    assert numbers["repetition_longest"] == pytest.approx(1)
    assert numbers["repetition_nearest_square"] < 0.5
