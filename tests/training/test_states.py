"""States on the disk: whole or not at all, the last good one kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_cli.errors import FileError, SdxlError
from sdxl_cli.training.config import LoopConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.state import find_state, load_state, save_state, states

ROOT = Path(__file__).parents[2]


def made(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "weights.a": torch.randn(3, 4, 2, 2, generator=generator).to(memory_format=torch.channels_last),
        "weights.empty": torch.zeros(0, 3),
        "optimizer.step.a": torch.tensor(float(number)),
        "random.cpu.0": torch.randint(256, (50,), generator=generator, dtype=torch.uint8),
    }


def saved(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save_state(folder, step, made(step), {"step": step}, keep=keep)


def assert_is(folder: Path, step: int) -> None:
    tensors, values = load_state(folder)
    assert values == {"step": step}
    assert all(torch.equal(value, made(step)[name]) for name, value in tensors.items())
    assert tensors.keys() == made(step).keys()


def test_a_state_is_read_as_it_was_written_and_old_ones_go(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10, 15)
    assert [path.name for path in states(tmp_path)] == ["step-00000015", "step-00000010"]
    assert sorted(path.name for path in states(tmp_path)[0].iterdir()) == [
        "part-00000.safetensors",
        "state.json",
    ]
    assert_is(tmp_path, 15)
    saved(tmp_path, 20, keep=1)
    assert [path.name for path in states(tmp_path)] == ["step-00000020"]


def test_nothing_in_a_state_is_a_pickle(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    files = {path.suffix: path for path in states(tmp_path)[0].iterdir()}
    assert files.keys() == {".json", ".safetensors"}
    json.loads(files[".json"].read_text())


def spoil(path: Path, how: str) -> None:
    part, index = path / "part-00000.safetensors", path / "state.json"
    data, text = part.read_bytes(), index.read_text()
    match how:
        case "cut off":
            part.write_bytes(data[:-7])
        case "a byte":
            part.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        case "header":
            part.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
        case "gone":
            part.unlink()
        case "index":
            index.write_text(text.replace('"step": 10', '"step": 11'))
        case "index cut off":
            index.write_text(text[:50])
        case "no index":
            index.unlink()


@pytest.mark.parametrize("how", ["cut off", "a byte", "header", "gone", "index", "index cut off", "no index"])
def test_a_damaged_state_is_said_and_the_one_before_is_taken(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 5, 10)
    spoil(states(tmp_path)[0], how)
    assert_is(tmp_path, 5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert str(states(tmp_path)[0]) in line
    assert "going on from step-00000005, the state before" in line
    saved(tmp_path, 10)
    assert_is(tmp_path, 10)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-00000005", "step-00000010"]


def test_a_state_saved_after_a_fall_back_stays_and_the_damaged_ones_go(tmp_path: Path) -> None:
    """With another ``save_every`` the next step that is saved may be before those that are damaged."""
    saved(tmp_path, 5, 10, 15, keep=3)
    for path in states(tmp_path)[:2]:
        spoil(path, "cut off")
    saved(tmp_path, 7)
    assert [path.name for path in states(tmp_path)] == ["step-00000007", "step-00000005"]
    assert_is(tmp_path, 7)


def test_without_a_whole_state_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="has no training state; give --output"):
        find_state(tmp_path)
    saved(tmp_path, 5, 10)
    for path in states(tmp_path):
        spoil(path, "cut off")
    with pytest.raises(FileError, match=r"step-00000010/part-00000.* no state before it is whole"):
        find_state(tmp_path)


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 5)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(SdxlError, match=r"step-00000010 needs 1\.\d+ M.*the disk has .* free; make room"):
        saved(tmp_path, 10)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000005"]
    assert_is(tmp_path, 5)


def test_a_run_that_could_not_be_saved_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room for less than weights, moments and averages of a thousand numbers."""

    class Task:
        module = torch.nn.Linear(999, 1)

        def step(self, index: int, generator: torch.Generator) -> Any:
            raise AssertionError("no step is made")

        def describe(self, index: int, generator: torch.Generator) -> Any: ...

    free = shutil.disk_usage(tmp_path)._replace(free=15_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(SdxlError, match=r"state needs 16.* k.*the disk has .* free; make room"):
        Run(Task(), LoopConfig(ema_decay=0.9), tmp_path, {}).train()


def test_a_write_that_fails_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 5)

    def full(*args: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdxl_cli.checkpoint.stream._write_all", full)
    with pytest.raises(SdxlError, match="disk is full; free some space"):
        saved(tmp_path, 10)
    monkeypatch.undo()
    assert_is(tmp_path, 5)


def test_a_run_killed_at_any_touch_of_the_disk_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed.py")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["kills"] > 40, "two saves have more places than that"
    assert said["different"] == []
