"""Prompt files, sweeps, grids, the prompt loop, previews and timings, as people run them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.generation import weights
from sdxl_cli.generation.metadata import read_record
from sdxl_cli.generation.picture import read_pixels


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Generate = Callable[..., Result]


@pytest.fixture
def generate(
    capsys: pytest.CaptureFixture[str], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Generate:
    """``sdxl generate`` with the small base and two steps, and something on stdin."""

    def run(*args: object, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        always = ["generate", "-m", models["base"], "--steps", 2]
        code = cli.run([str(arg) for arg in [*always, *args]])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every part that is read from a file, as it is read."""
    seen: list[str] = []
    real = weights.load_model

    def load(files: Any, parts: Any, **rest: Any) -> Any:
        seen.append(f"{files.name} {parts[0]}")
        return real(files, parts, **rest)

    monkeypatch.setattr(weights, "load_model", load)
    return seen


def request_of(path: Path) -> Any:
    stored = read_record(path)
    assert stored is not None
    return stored.request


def test_each_line_is_as_if_it_had_been_asked_for_alone(generate: Generate, loads: list[str]) -> None:
    Path("p.txt").write_text(
        'a red guitar --d 5\na table --n red --d 6 --w 96\n{"prompt": "blue", "seed": 7}\n'
    )
    together = generate("--prompts-file", "p.txt", "-o", "all").paths
    assert [path.name for path in together] == ["sdxl-00000-5.png", "sdxl-00001-6.png", "sdxl-00002-7.png"]
    assert loads == ["base text", "base unet", "base vae"]
    alone = [
        generate("a red guitar", "--seed", 5),
        generate("a table", "--neg", "red", "--seed", 6, "-W", 96),
        generate("blue", "--seed", 7),
    ]
    for path, single in zip(together, alone, strict=True):
        assert path.read_bytes() == single.paths[0].read_bytes()


def test_lines_may_come_from_a_pipe_and_name_their_files(generate: Generate) -> None:
    lines = '{"prompt": "a table", "output": "x/table.webp"}\na guitar --s 1 --o guitars/\n'
    result = generate("--prompts-file", "-", "--seed", 3, stdin=lines)
    assert result.paths == [Path("x/table.webp"), Path("guitars/sdxl-00000-3.png")]
    assert [request_of(path).steps for path in result.paths] == [2, 1]


def test_nothing_is_made_when_any_line_is_wrong(generate: Generate, loads: list[str]) -> None:
    Path("p.txt").write_text("fine\nx --size 99x64\n\nx --sampler eulr\n--s 3\n")
    result = generate("--prompts-file", "p.txt")
    assert (result.code, result.out, loads) == (2, "", [])
    assert "p.txt:5: has no prompt" in result.err
    Path("p.txt").write_text("fine\nx --size 99x64\n\nx --sampler eulr\nx --m gone.safetensors\n")
    result = generate("--prompts-file", "p.txt")
    assert "p.txt:5: unknown setting 'm'" in result.err
    Path("p.txt").write_text("fine\nx --size 99x64\n\nx --sampler eulr\nx --model gone.safetensors\n")
    result = generate("--prompts-file", "p.txt")
    assert (result.code, result.out, loads) == (2, "", [])
    for words in (
        "p.txt:2: --size 99x64: both sides",
        "p.txt:4: --sampler 'eulr'",
        "p.txt:5: gone.safetensors",
    ):
        assert words in result.err
    assert not Path("outputs").exists()


def test_a_sweep_makes_all_combinations_and_a_labelled_grid(generate: Generate, loads: list[str]) -> None:
    result = generate("a guitar", "--sweep", "cfg-scale=1,3,7", "--sweep", "seed=5,6", "--grid")
    *cells, grid = result.paths
    asked = [(request_of(path).seed, request_of(path).cfg_scale) for path in cells]
    assert asked == [(seed, cfg) for seed in (5, 6) for cfg in (1.0, 3.0, 7.0)]
    assert loads == ["base text", "base unet", "base vae"]
    assert grid.name == "sdxl-grid-00000-5.png"
    pixels, first = read_pixels(grid), read_pixels(cells[0])
    found = {path: place(pixels, read_pixels(path)) for path in cells}
    columns = sorted({x for x, _ in found.values()})
    rows = sorted({y for _, y in found.values()})
    assert [found[path] for path in cells] == [(x, y) for y in rows for x in columns]
    assert (len(columns), len(rows)) == (3, 2)
    for x in columns:  # something is written above every column, and beside every row
        assert (pixels[: rows[0], x : x + first.shape[1]] < 128).any()
    for y in rows:
        assert (pixels[y : y + first.shape[0], : columns[0]] < 128).any()
    with pytest.raises(Exception, match="is a grid of 6 pictures"):
        read_record(grid)


def place(grid: np.ndarray, cell: np.ndarray) -> tuple[int, int]:
    """(x, y) of the only place where the cell's pixels are in the grid."""
    windows = np.lib.stride_tricks.sliding_window_view(grid, (1, 16, 3))[:, :, 0, 0]
    at = np.argwhere((windows == cell[0, :16]).all((2, 3)))
    h, w = cell.shape[:2]
    whole = [(x, y) for y, x in at if np.array_equal(grid[y : y + h, x : x + w], cell)]
    assert len(whole) == 1
    return int(whole[0][0]), int(whole[0][1])


def test_models_of_a_sweep_are_loaded_once_each(
    generate: Generate, loads: list[str], models: dict[str, Path]
) -> None:
    paths = generate(
        "a guitar",
        "--seed",
        5,
        "--sweep",
        "steps=1,2",
        "--sweep",
        f"model={models['base']},{models['pruned']}",
    ).paths
    assert [(request_of(path).model, request_of(path).steps) for path in paths] == [
        (str(models[name]), steps) for name in ("base", "pruned") for steps in (1, 2)
    ]
    swapped = generate(
        "a guitar",
        "--seed",
        5,
        "--sweep",
        f"model={models['base']},{models['pruned']}",
        "--sweep",
        "steps=1,2",
    )
    assert [(request_of(path).model, request_of(path).steps) for path in swapped.paths] == [
        (str(models[name]), steps) for name in ("base", "pruned") for steps in (1, 2)
    ]
    parts = [f"{name} {part}" for name in ("base", "pruned") for part in ("text", "unet", "vae")]
    assert loads == parts * 2


def test_a_grid_of_seeds_or_prompts_is_nearly_square(generate: Generate) -> None:
    grid = generate("a guitar", "--num-images", 4, "--seed", 1, "--grid", "-o", "g.png").paths[-1]
    assert grid.name == "g-grid-00000-1.png"
    width, height = Image.open(grid).size
    assert 128 < width < 192
    assert 128 < height < 256


def test_json_has_every_job_and_the_timings(generate: Generate) -> None:
    found = json.loads(generate("a guitar", "--sweep", "steps=1,3", "--seed", 4, "--json", "--timings").out)
    assert [job["request"]["steps"] for job in found["jobs"]] == [1, 3]
    timings = found["timings"]
    assert timings["steps"]["count"] == 4
    stages = [timings[name] for name in ("load", "text", "unet", "vae", "save")]
    assert all(seconds > 0 for seconds in stages)
    assert timings["total"] == pytest.approx(sum(stages), abs=1e-3)
    assert timings["total"] <= found["seconds"]
    assert timings["steps"]["mean"] * 4 == pytest.approx(timings["unet"], rel=0.5)


def test_timings_are_a_table_beside_the_results(generate: Generate) -> None:
    result = generate("a guitar", "--timings", "--seed", 4)
    assert result.out == "outputs/sdxl-00000-4.png\n"
    assert "U-Net" in result.err
    assert "2 steps of" in result.err


def test_the_preview_of_the_last_step_resembles_the_picture(generate: Generate) -> None:
    (path,) = generate(
        "a red apple",
        "-m",
        "bundled",
        "--steps",
        4,
        "--seed",
        4,
        "--preview",
        "file",
        "--preview-path",
        "now.png",
    ).paths
    shown = np.asarray(Image.open("now.png").convert("RGB").resize((32, 32), Image.Resampling.BOX), float)
    made = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BOX), float)
    assert np.corrcoef(shown.ravel(), made.ravel())[0, 1] > 0.9
    plain = generate("a red apple", "-m", "bundled", "--steps", 4, "--seed", 4).paths[0]
    assert plain.read_bytes() == path.read_bytes()


def test_a_preview_without_a_terminal_is_a_warning(generate: Generate) -> None:
    result = generate("a guitar", "--preview", "terminal")
    assert result.code == 0
    assert "warning: --preview terminal: stderr is no terminal" in result.err
    assert generate("x", "--preview", "tv").err.endswith("--preview tv: there are none, terminal, file\n")


def test_the_prompt_loop_loads_once_and_goes_on_after_mistakes(generate: Generate, loads: list[str]) -> None:
    lines = (
        "a guitar\n\n--seed 9 --steps 3\na table --s 1\n/again\nx --foo 3\na guitar --sampler nothing\nblue"
    )
    result = generate("--interactive", "--seed", 5, stdin=lines)
    assert result.code == 2
    assert "line 6: unknown setting 'foo'" in result.err
    assert "line 7: --sampler 'nothing'" in result.err
    made = [request_of(path) for path in result.paths]
    assert [(r.prompt, r.seed, r.steps) for r in made] == [
        ("a guitar", 5, 2),
        ("a table", 9, 1),
        ("a table", 9, 3),
        ("blue", 9, 3),
    ]
    assert loads == ["base text", "base unet", "base vae"]


def test_programs_get_one_line_of_json_for_each_of_theirs(generate: Generate) -> None:
    lines = '{"prompt": "a guitar", "seed": 5}\n{"promp": "x"}\n{"prompt": "a table", "seed": 6}\n'
    first, second, third = generate("--interactive", "--json", "-q", stdin=lines).lines
    assert (first["job"], first["pictures"][0]["seed"]) == ("line 1", 5)
    assert (second["exit_code"], second["job"]) == (2, "line 2")
    assert "unknown setting 'promp'; did you mean prompt" in second["error"]
    assert Path(third["pictures"][0]["path"]).is_file()


def test_show_help_and_quit(generate: Generate) -> None:
    result = generate("--interactive", stdin="/show\n/help\n/quit\na guitar\n")
    assert (result.code, result.out) == (0, "")
    assert "steps = 2" in result.err
    assert "/again" in result.err


def test_the_loop_answers_before_its_input_ends(models: dict[str, Path]) -> None:
    """A program that writes a line and waits for the answer must not wait for ever."""
    args = ["generate", "--interactive", "--json", "-q", "-m", str(models["base"]), "--steps", "1"]
    command = [sys.executable, "-m", "sdxl_cli", *args]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as loop:
        assert loop.stdin is not None
        assert loop.stdout is not None
        for seed in (1, 2):
            loop.stdin.write(json.dumps({"prompt": "a guitar", "seed": seed}) + "\n")
            loop.stdin.flush()
            assert json.loads(loop.stdout.readline())["pictures"][0]["seed"] == seed
        loop.stdin.close()
        assert loop.wait(30) == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--interactive", "--grid"], "--interactive and --grid: give one of the two"),
        (["x", "--sweep", "stepps=3"], "unknown setting 'stepps'; did you mean steps"),
        (["--prompts-file", "gone.txt"], "gone.txt: cannot be read"),
        (["x", "--preview", "file", "--preview-path", "a.xyz"], "unknown picture format '.xyz'"),
    ],
)
def test_flags_that_make_no_sense(generate: Generate, args: list[str], words: str) -> None:
    result = generate(*args)
    assert result.code in (2, 3)
    assert words in result.err


def test_what_is_wrong_with_every_line_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("three.txt").write_text("a cup\na cat\na dog\n")
    assert cli.run(["generate", "--prompts-file", "three.txt", "-m", "none.safetensors"]) == 3
    assert (
        capsys.readouterr().err == "sdxl: three.txt:1 and 2 more: none.safetensors: no such file or folder\n"
    )
