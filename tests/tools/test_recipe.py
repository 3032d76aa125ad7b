"""The bundled model's recipe as one command: the same as in the docs, all of it, and gone on with where it stopped."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_cli import cli

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools" / "bundled_model"


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("train")


def documented() -> list[str]:
    """The commands of docs/bundled-model.md, one a line, loops written out."""
    text = (ROOT / "docs" / "bundled-model.md").read_text("utf-8").replace("\\\n", " ")
    (block,) = (block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "train-vae" in block)
    loop = re.compile(r"for name in (.*?); do\n(.*?)\ndone", re.DOTALL)
    block = loop.sub(
        lambda found: "\n".join(found[2].replace("$name", name) for name in found[1].split()), block
    )
    lines = [line.strip() for line in block.splitlines()]
    return [shlex.join(shlex.split(line)) for line in lines if line.startswith(("sdxl ", "python "))]


def test_the_docs_have_the_same_commands(train: Any) -> None:
    ours = [shlex.join(step.words) for step in train.recipe()]

    def sets(commands: Sequence[str]) -> list[tuple[str, ...]]:
        return sorted(tuple(sorted(shlex.split(command))) for command in commands)

    assert sets(ours) == sets(documented())


def pictures(folder: Path, count: int) -> None:
    """What build_dataset.py writes, in small: discs of two colours."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        name = ("red", "blue")[number % 2]
        pixels = np.full((256, 256, 3), 255, np.uint8)
        pixels[60 + number : 160, 60:160] = (220, 30, 30) if name == "red" else (30, 30, 220)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.webp")
        rows.append({
            "file_name": f"images/{number}.webp", "text": f"a {name} ball", "texts": [f"a {name} ball"],
            "aesthetic_score": 6.0, "object": "ball", "kind": "plain", "background": "white",
        })  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("all", "common", "plain", "all-plain"):
        pictures(tmp_path / "data" / name, 16)
    (tmp_path / "data" / "all" / "flats").mkdir()
    for number in range(4):
        pixels = np.full((256, 256, 3), 60 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "all" / "flats" / f"{number}.webp")
    return tmp_path / "data"


@pytest.mark.slow
def test_the_whole_chain_in_two_steps_each(train: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    """Stopped once on the way: what was done is not done again, and nothing is lost."""
    ran: list[str] = []
    stopped: list[bool] = []
    runs = tmp_path / "runs"
    flags = ["--data", str(data), "--output", str(runs), "--device", "cpu", "--dtype", "fp32", "--trial", "2"]

    def call(words: Sequence[str]) -> int:
        if words[0] == "python":
            return 1  # the ten-hue test does not pass after two steps
        if f"{runs}/unet-common" in words and not stopped:
            stopped.append(True)
            return 130
        ran.append(" ".join(words))
        return cli.run([*words[1:], "--quiet"])

    with pytest.raises(SystemExit) as ended:
        train.main(flags, run=call)
    assert ended.value.code == 130
    before = len(ran)
    train.main(flags, run=call)
    assert not [command for command in ran[before:] if "vae-f4" in command.split("--output")[-1]]
    found = json.loads((runs / "recipe.json").read_text("utf-8"))
    steps = {step["name"]: step for step in found["steps"] if "curve" in step}
    names = [
        "vae-f4",
        "vae",
        "unet-64",
        "unet-plain",
        "unet-common",
        "unet-all-plain",
        "unet-all",
        "unet-128",
        "refiner",
    ]
    assert list(steps) == names
    for step in steps.values():
        assert step["done"]
        assert [point[0] for point in step["curve"]] == [1, 2]
        assert step["loss"] > 0
    assert (runs / "unet-128" / "model.safetensors").exists()
    assert (runs / "refiner" / "model.safetensors").exists()
    assert "| refiner | 2 |" in capsys.readouterr().out
    flags[-1] = "3"
    with pytest.raises(SystemExit, match="vae-f4 was another command"):
        train.main(flags, run=call)


def test_a_run_with_a_state_goes_on(train: Any, tmp_path: Path) -> None:
    (tmp_path / "vae" / "state" / "step-00000500").mkdir(parents=True)
    seen: list[Sequence[str]] = []
    cook = train.Cook(tmp_path, {}, ["--device", "cpu"], lambda words: seen.append(words) or 0)
    steps = [step for step in train.training("data", str(tmp_path)) if step.name in ("vae-f4", "vae")]
    assert cook.follow(steps) == 0
    assert [words[-1] == "--resume" for words in seen] == [False, True]
    assert cook.follow(steps) == 0
    assert len(seen) == 2, "what is done is not done again"
