"""The benchmark of training: the whole of it at a tiny size on the CPU, and what it does where memory or time end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_whole_script_at_a_tiny_size(tmp_path: Path) -> None:
    """Rows of both sides with everything in them, losses that agree, and a reason for every row that is not there."""
    out = tmp_path / "out.json"
    flags = ["--device", "cpu", "--model", "tiny", "--size", "64", "--most", "2", "--rounds", "1"]
    ran = subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu_training.py"), *flags, "--json", str(out)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": _path()}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text("utf-8"))
    rows = {(row["side"], row["way"], row["batch"]): row for row in found["rows"]}
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["tflop"] > 0
        assert row["allocated_gib"] > 0
        assert 0 < row["of_matrix_rate"] < 1.5
    ours = {
        memory: rows["sdxl", f"recomputes {memory}, adamw", 1] for memory in ("none", "ff", "blocks", "all")
    }
    assert ours["none"]["tflop"] < ours["ff"]["tflop"] < ours["blocks"]["tflop"] < ours["all"]["tflop"]
    theirs = rows["diffusers", "no checkpointing", 1]
    for row in (*ours.values(), theirs, rows["diffusers", "gradient checkpointing", 1]):
        assert row["losses_apart"] < 1e-5
    assert rows["sdxl", "recomputes none, adafactor", 1]["losses_apart"] > 1e-4, "other updates are seen"
    assert theirs["ours_faster"]["count"] == 1
    assert rows["diffusers", "gradient checkpointing", 2]["all_fit"]
    assert {one["why"] for one in found["left_out"]} == {
        'weight_dtype = "bf16" computes in bf16, too; give --dtype bf16 or leave it out'
    }
    assert "the fastest that fits: sdxl" in ran.stdout


def _path() -> str:
    return os.pathsep.join(path for path in sys.path if path)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_training
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_training.py"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu_training.main()


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 11, 15, 16, 40, 64, 90])
def test_the_largest_batch(room: int) -> None:
    """Exact up to 8, above to an eighth of it; never one that does not fit, and none twice."""
    from gpu_training import largest

    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= room

    best = largest(fits, 64, lambda: True)
    assert best <= min(room, 64)
    assert min(room, 64) - best < max(1, best / 8)
    assert len(set(tried)) == len(tried)
    assert max(tried) <= 64


def test_the_search_ends_with_its_time() -> None:
    from gpu_training import largest

    tried: list[int] = []
    best = largest(lambda batch: not tried.append(batch), 64, lambda: len(tried) < 3)  # type: ignore[func-returns-value]
    assert tried == [1, 2, 4]
    assert best == 4


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeSide:
    """A side that has room for so many pictures, and takes a second for each."""

    def __init__(self, name: str, room: int, clock: Clock, loss: float = 1.0) -> None:
        self.name, self.room, self.clock, self.loss, self.rate = name, room, clock, loss, 1e12
        self.batch, self.built = 0, 0

    def build(self, way: Any, batch: int) -> None:
        self.batch, self.built = batch, self.built + 1

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        from gpu_training import Full

        if do == "data":
            self.batch = more["batch"]
        elif do == "count":
            return {"flops": 10**11}
        elif do == "step":
            if self.batch > self.room:
                raise Full
            self.clock.now += self.batch
            return {
                "seconds": float(self.batch),
                "loss": self.loss,
                "allocated": 1 << 30,
                "reserved": 2 << 30,
            }
        return {}

    def free(self) -> None:
        self.batch = 0

    def close(self) -> None:
        pass


def bench(tmp_path: Path, minutes: float, room: int, **changes: Any) -> Any:
    import gpu_training
    from rows import Rows

    clock = Clock()
    rows = Rows(minutes, tmp_path / "out.json", {"model": "fake"}, clock)
    sides = {name: FakeSide(name, room, clock, **changes.get(name, {})) for name in ("sdxl", "diffusers")}
    return gpu_training.Bench(Namespace(rounds=2, most=64, dtype="bf16"), rows, sides)


def test_where_memory_ends(tmp_path: Path) -> None:
    import gpu_training

    one = bench(tmp_path, 60, room=11)
    one.run(
        [gpu_training.Row("one", (gpu_training.Way(),)), gpu_training.Row("largest", (gpu_training.Way(),))]
    )
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))["rows"]
    assert [row["batch"] for row in found] == [1, 1, 11]
    assert (found[2]["largest"], found[2]["all_fit"]) == (11, False)
    assert found[2]["tflop"] == pytest.approx(1.1)
    assert found[2]["of_matrix_rate"] == pytest.approx(0.1)
    none = bench(tmp_path, 60, room=0)
    none.run([gpu_training.Row("largest", (gpu_training.Way(),))])
    assert none.rows.left_out[0]["why"] == "memory is not enough"


def test_where_time_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row is not begun that would take as long as one of its kind has, and longer than there is."""
    import gpu_training

    one = bench(tmp_path, 0.3, room=64)  # 18 seconds, 10 of them to end in
    row = gpu_training.Row("one", (gpu_training.Way(),))
    one.run([row, row, row])
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert len(found["rows"]) == 1
    assert [left["why"] for left in found["left_out"]] == ["it takes about 4 s, and 4 s are left"] * 2
    assert "left out: one picture: sdxl, recomputes none, adamw: it takes" in capsys.readouterr().out


def test_losses_that_do_not_agree_are_not_passed_over(tmp_path: Path) -> None:
    import gpu_training

    rows = [gpu_training.Row("one", (gpu_training.Way(), gpu_training.THEIRS))]
    same = bench(tmp_path, 60, room=64)
    same.run(rows)
    assert not same.disagree
    other = bench(tmp_path, 60, room=64, diffusers={"loss": 1.1})
    other.run(rows)
    assert other.disagree == ["diffusers, no checkpointing: 1.0e-01"]


def test_without_diffusers_ours_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_training

    monkeypatch.setattr(gpu_training, "missing", lambda *names: "diffusers is not installed")
    one = bench(tmp_path, 60, room=4)
    one.run(gpu_training.ROWS[:2])
    assert [row["side"] for row in one.rows.rows] == ["sdxl", "sdxl"]
    said = capsys.readouterr().out
    assert "left out: one picture: diffusers, gradient checkpointing: diffusers is not installed" in said


def test_memory_that_is_not_enough_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process lives on, and can be told to do less."""
    import gpu_training
    import torch

    shop = gpu_training.Workshop(Namespace(model="tiny", device="cpu", dtype="fp32", size=64))
    forgot: list[bool] = []

    def burst(index: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    shop.trainee = SimpleNamespace(prepare=lambda index: None, step=burst, forget=lambda: forgot.append(True))  # type: ignore[assignment]
    assert shop.obey({"do": "step", "index": 0}) == {"full": True}
    assert forgot == [True]
    assert shop.obey({"do": "free"}) == {}
