"""Sweeps: which requests come out, in which order."""

from __future__ import annotations

from itertools import product

import pytest

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.batchfile import Line
from sdxl_cli.generation.jobs import LIGHT_FIELDS, expand
from sdxl_cli.generation.request import RANDOM_SEED, GenerateRequest
from sdxl_cli.generation.sweep import combinations, parse_sweep, parse_sweeps
from sdxl_cli.generation.values import hints

BASE = GenerateRequest(prompt="a red cat", negative_prompt="red dogs", seed=5)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("cfg-scale=3,5,7", ("3", "5", "7")),
        ("steps=1-5", ("1", "2", "3", "4", "5")),
        ("steps=10-30(+10)", ("10", "20", "30")),
        ("steps = 30-10 (-10)", ("30", "20", "10")),
        ("cfg_scale=0-1[5]", ("0", "0.25", "0.5", "0.75", "1")),
        ("cfg-scale=0.1-0.5(+0.1)", ("0.1", "0.2", "0.3", "0.4", "0.5")),
        ("guidance-scale=1, 2-4", ("1", "2", "3", "4")),
        ('crop-top-left="0,0","8,8"', ("0,0", "8,8")),
        ('prompt="a cat, red",a dog', ("a cat, red", "a dog")),
        ("seed=-1", ("-1",)),
        ("sampler=euler,DPM++ 2M", ("euler", "DPM++ 2M")),
    ],
)
def test_values_and_ranges_as_a1111_writes_them(text: str, values: tuple[str, ...]) -> None:
    assert parse_sweep(text, {"guidance-scale": "cfg_scale"}).values == values


def test_the_first_sweep_changes_fastest() -> None:
    axes = parse_sweeps(["cfg-scale=3,5,7", "steps=10,20"], {})
    made = list(combinations(BASE, axes))
    assert [(r.steps, r.cfg_scale) for _, r in made] == list(product((10, 20), (3.0, 5.0, 7.0)))
    assert [cell for cell, _ in made] == [(x, y) for y in range(2) for x in range(3)]
    assert {(r.prompt, r.seed) for _, r in made} == {("a red cat", 5)}


def test_search_and_replace_changes_all_prompts() -> None:
    axis = parse_sweep("prompt-sr=red,blue,dark green", {})
    made = [request for _, request in combinations(BASE, [axis])]
    assert [(r.prompt, r.negative_prompt) for r in made] == [
        ("a red cat", "red dogs"),
        ("a blue cat", "blue dogs"),
        ("a dark green cat", "dark green dogs"),
    ]
    with pytest.raises(UsageError, match="'pink', the first of the values, is in no prompt"):
        list(combinations(BASE, [parse_sweep("prompt-sr=pink,blue", {})]))


def test_a_random_seed_is_drawn_once_for_a_sweep_and_once_per_line() -> None:
    random = GenerateRequest(prompt="x", seed=RANDOM_SEED)
    swept = expand(random, [], parse_sweeps(["steps=1-4"], {}))
    assert len({job.request.seed for job in swept}) == 1
    assert swept[0].request.seed != RANDOM_SEED
    lines = [Line(f"p:{i}", {"prompt": str(i)}) for i in (1, 2)]
    jobs = expand(random, lines, parse_sweeps(["steps=1-4"], {}))
    assert [(job.line, job.request.prompt, job.request.steps) for job in jobs] == [
        (line, str(line + 1), steps) for line in (0, 1) for steps in (1, 2, 3, 4)
    ]
    assert len({job.request.seed for job in jobs}) == 2


def test_fields_that_need_other_weights_are_few() -> None:
    """A new field of the request belongs in one of the two lists; unlisted, its sweep loads the model every time."""
    heavy = {
        "model", "vae", "refiner", "lora", "lora_dir", "prediction", "zero_terminal_snr", "device", "dtype",
        "vae_dtype", "vram", "winograd", "prepack", "compile", "cuda_graphs",
    }  # fmt: skip
    assert set(hints(GenerateRequest)) == heavy | LIGHT_FIELDS
    assert not heavy & LIGHT_FIELDS


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["cfg-scale"], "expected NAME=VALUE,VALUE"),
        (["cfg-scale="], "expected NAME=VALUE,VALUE"),
        (["cfg=3"], "unknown setting 'cfg'"),
        (["steps=3,x"], "steps: expected a whole number, got 'x'"),
        (["steps=0-1[5]"], "steps: expected a whole number, got '0.25'"),
        (["steps=1-5(-1)"], "do not lead from 1 to 5"),
        (["steps=1", "steps=2"], "is swept twice"),
    ],
)
def test_what_is_no_sweep(texts: list[str], words: str) -> None:
    with pytest.raises(UsageError) as told:
        parse_sweeps(texts, {})
    assert words in str(told.value)
