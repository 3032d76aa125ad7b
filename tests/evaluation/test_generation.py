"""A model's pictures measured as they are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.evaluation.curve import points
from sdxl_cli.evaluation.pictures import read_prompts
from sdxl_cli.evaluation.scores import Row, Score
from sdxl_cli.generation import pipeline
from tests.evaluation.conftest import scores

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def prompts(own_place: Path) -> Path:
    path = own_place / "prompts.txt"
    path.write_text("a red guitar\na blue cat\na green table\n")
    return path


def asked(prompts: Path, model: Path, clip: Path) -> tuple[object, ...]:
    return (
        "generation", prompts, "--model", model, "--steps", 2, "--samples", 4, "--picture-size", "64x64", "--seed", 7,
        "--clip-model", clip, "--batch-size", 2, "--dtype", "fp32",
    )  # fmt: skip


def test_a_curve_over_guidance_scales_and_the_same_numbers_from_the_saved_pictures(
    prompts: Path,
    model_file: Path,
    clip_folder: Path,
    inception_file: Path,
    own_place: Path,
    run: Run,
) -> None:
    networks, reference = ("--inception-weights", inception_file), own_place / "reference.npz"
    features = np.random.default_rng(0).random((5, 2048), np.float32)
    np.savez(reference, mu=features.mean(0), sigma=np.cov(features.T), features=features)
    content = run(
        *asked(prompts, model_file, clip_folder), *networks, "--cfg-scale", "1,6", "--reference", reference,
        "--metrics", "kid,is,clip", "--kid-subset-size", 3, "--is-splits", 2, "--size", 48, "-o", "a",
    )  # fmt: skip
    assert [row["name"] for row in content["results"]] == ["cfg 1", "cfg 6"]
    found = scores(content, 1)
    assert set(found) == {"KID", "IS", "CLIP score"}
    again = run(
        "images", "a/cfg-6/pictures", "--reference", reference, *networks, "--size", 48,
        "--metrics", "kid,is", "--kid-subset-size", 3, "--is-splits", 2, "-o", "b", "--batch-size", 2,
    )  # fmt: skip
    for metric in ("KID", "IS"):
        assert found[metric]["value"] == pytest.approx(scores(again)[metric]["value"], rel=1e-6)
    assert scores(content, 0)["KID"]["value"] != scores(content, 1)["KID"]["value"]
    assert Image.open("a/results.png").size == (1280, 880)
    assert content["settings"]["seed"] == 7
    assert content["settings"]["samples"] == 4
    assert list(content["settings"]["models"]) == ["base"]


def test_pictures_are_those_of_generate_and_clip_reads_their_prompts(
    prompts: Path, model_file: Path, clip_folder: Path, run: Run
) -> None:
    content = run(*asked(prompts, model_file, clip_folder), "--metrics", "clip", "-o", "a")
    made = [
        "a blue cat",
        "--model",
        model_file,
        "--steps",
        2,
        "--size",
        "64x64",
        "--seed",
        8,
        "--dtype",
        "fp32",
    ]
    assert cli.run(["generate", *map(str, made), "--device", "cpu", "-o", "one.png", "-q"]) == 0
    from sdxl_cli.generation.picture import read_pixels

    assert (read_pixels(Path("a/cfg-5/pictures/000001.png")) == read_pixels(Path("one.png"))).all()
    # prompts are in the pictures' own records; the fourth is the first again
    again = run(
        "images",
        "a/cfg-5/pictures",
        "--metrics",
        "clip",
        "--clip-model",
        clip_folder,
        "-o",
        "b",
        "--batch-size",
        2,
    )
    assert scores(again)["CLIP score"] == scores(content)["CLIP score"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_was_killed_goes_on_to_the_same_numbers(
    prompts: Path,
    model_file: Path,
    clip_folder: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    keep: bool,
) -> None:
    args = (
        *asked(prompts, model_file, clip_folder),
        "--metrics",
        "clip",
        *(() if keep else ("--no-pictures",)),
    )
    whole = run(*args, "-o", "whole")
    real, made = pipeline.generate, []

    def counting(plan: Any, *rest: Any, **more: Any) -> Any:
        made.append(plan.request.seed)
        if stop and len(made) == stop:
            raise KeyboardInterrupt
        return real(plan, *rest, **more)

    monkeypatch.setattr(pipeline, "generate", counting)
    stop = 4
    assert cli.run(["eval", *map(str, args), "-o", "parts", "--device", "cpu"]) == 130
    stop = 0
    assert run(*args, "-o", "parts")["results"] == whole["results"]
    # what was kept is not made again, and so only the one that was under way
    assert made == ([7, 8, 9, 10, 10] if keep else [7, 8, 9, 10, 9, 10])
    assert Path("parts/cfg-5/pictures").exists() is keep


def test_prompts_of_many_files(tmp_path: Path) -> None:
    texts = ["a cat", "a dog"]
    coco = {
        "images": [{"id": 9}, {"id": 4}],
        "annotations": [
            {"id": 3, "image_id": 9, "caption": "a dog "},
            {"id": 5, "image_id": 4, "caption": "another"},
            {"id": 1, "image_id": 4, "caption": "a cat"},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "list.json").write_text(json.dumps(texts))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"caption": text}) + "\n" for text in texts))
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na dog\tAnimals\n")
    (tmp_path / "table.csv").write_text("id,text\n1,a cat\n2,a dog\n")
    (tmp_path / "lines.txt").write_text("a cat\n\na dog\n")
    for name in ("coco.json", "list.json", "lines.jsonl", "parti.tsv", "table.csv", "lines.txt"):
        assert read_prompts(tmp_path / name) == texts, name


def test_prompts_that_cannot_be_read(own_place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").write_text("\n")
    Path("other.csv").write_text("a,b\n1,2\n")
    for name, says in (
        ("empty.txt", "has no prompts"),
        ("other.csv", "no column prompt, caption, text"),
        ("missing.txt", "No such file"),
    ):
        with pytest.raises(Exception, match=says):
            read_prompts(Path(name))


def test_the_curve_has_a_point_for_every_scale_that_has_both_numbers() -> None:
    def row(name: str, **values: float) -> Row:
        made = [
            Score(metric=metric.replace("_", " "), value=value, better="") for metric, value in values.items()
        ]
        return Row(name=name, scores=tuple(made))

    rows = [
        row("cfg 1", FID=30.0, CLIP_score=20.0),
        row("cfg 2", FID=20.0, CLIP_score=25.0),
        row("cfg 3", FID=1.0),
    ]
    found = points(rows)
    assert found is not None
    assert found[0] == "FID"
    assert [(point.x, point.y) for point in found[1]] == [(20.0, 30.0), (25.0, 20.0)]
    assert points(rows[:1]) is None
    assert points([row("cfg 1", KID=0.1), row("cfg 2", KID=0.2)]) is None
