"""The benchmark of generation: the whole of it at a tiny size on the CPU, and what it does where time or sides end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_whole_script_at_a_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ["--device", "cpu", "--model", "tiny", "--side", "64", "--steps", "2,3", "--rounds", "1"]
    flags += ["--peers", "default", "--only", "image,unet", "--many", "2", "--threads", "1"]
    flags += ["--weights", str(tmp_path / "weights"), "--json", str(out)]
    ran = subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu_generation.py"), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text("utf-8"))
    rows = {(row["kind"], row["batch"], row["steps"], row["side"]): row for row in found["rows"]}
    both = ("sdxl", "diffusers-default")
    parts = [("unet", 1, None), ("unet", 2, None)]
    pictures = [("image", batch, steps) for batch in (1, 2) for steps in (2, 3)]
    expected = {(*key, side) for key in (*parts, *pictures) for side in both} | {("image", 1, 2, "sdxl-med")}
    assert set(rows) == expected
    assert not found["left_out"]
    for kind, batch, steps in parts + pictures:
        ours, theirs = (rows[kind, batch, steps, side] for side in both)
        assert ours["tflop"] < 0.95 * theirs["tflop"], "the same work with less arithmetic"
        assert theirs["ours_faster"]["median"] == pytest.approx(theirs["seconds"] / ours["seconds"])
        assert theirs["difference"] < 5e-3
    step = rows["image", 1, 3, "sdxl"]["tflop"] - rows["image", 1, 2, "sdxl"]["tflop"]
    assert step == pytest.approx(rows["unet", 1, None, "sdxl"]["tflop"], rel=0.02)
    assert rows["image", 1, 2, "sdxl-med"]["difference"] == 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_generation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_generation.py"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu_generation.main()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A side that takes a second for every step of every picture; compiling takes two minutes, or fails."""

    clock = Clock()
    fails: tuple[str, ...] = ()
    error = 1.0

    def __init__(self, name: str, job: Any) -> None:
        from job import Job

        self.name, self.kind, self.read = name, job, Job.from_text
        self.job, self.first = job, "compiled" in name

    def order(self, do: str, **more: Any) -> None:
        self.job = self.read(more["job"])

    def answer(self, within: float | None = None) -> dict[str, Any]:
        return {}

    def ready(self, within: float | None = None) -> dict[str, Any]:
        from child import Ended

        if self.name in self.fails:
            raise Ended(f"{self.name} ended with status 1; what it said is above")
        return {"machine": {"torch": "fake"}}

    def ask(self, do: str, *, within: float | None = None, **more: Any) -> dict[str, Any]:
        from child import OutOfTime
        from safetensors.torch import save_file

        if do != "run":
            return {"rate": 1e13, "flops": 10**12 * more.get("steps", 1)}
        seconds = more.get("steps", 1) * self.job.batch + (120.0 if self.first else 0.0)
        assert within is not None
        if seconds > within:
            self.clock.now += within
            raise OutOfTime(f"{self.name} was not done in time and was ended")
        self.first = False
        self.clock.now += seconds
        if path := more.get("save"):
            value = 1.0 + self.error * (1e-2 if self.name == "sdxl" else 1e-3 * ("-" in self.name))
            save_file({"out": torch.full((3,), value)}, Path(path))
        return {"seconds": seconds, "memory": {"most": 1 << 30, "reserved": 2 << 30}}

    def close(self) -> None:
        pass

    kill = close


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    import gpu_generation

    monkeypatch.setattr(Fake, "clock", Clock())
    monkeypatch.setattr(gpu_generation, "missing", lambda *names: "")
    return Fake


def bench(tmp_path: Path, minutes: float, **changes: Any) -> Any:
    import gpu_generation
    from job import Job
    from rows import Rows

    given: dict[str, Any] = {"steps": (30, 50), "many": 8, "rounds": 1, "peers": "default,compiled"}
    rows = Rows(minutes, tmp_path / "out.json", {}, Fake.clock)
    job = Job(folder="none", kind="image", height=64, width=64, dtype="bf16")
    return gpu_generation.Bench(Namespace(**(given | changes)), job, rows, Fake)


def test_every_row_when_there_is_time(tmp_path: Path, fake: type[Fake]) -> None:
    import gpu_generation

    one = bench(tmp_path, 120)
    one.run(gpu_generation.ROWS)
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert not found["left_out"]
    compiled = [row for row in found["rows"] if "compiled" in row["row"]]
    assert [row["side"] for row in compiled] == ["sdxl", "diffusers-compiled"] * 2
    assert [row["first_s"] for row in compiled] == [2, 122] * 2, "a column of its own, and not in the rounds"
    assert [row["seconds"] for row in compiled] == [30, 30, 50, 50]
    assert [row["of_matrix_rate"] for row in compiled] == pytest.approx([0.1] * 4)
    last = [row["row"] for row in found["rows"]][-4:]
    assert last == ["image, batch 1, compiled"] * 4
    assert one.far[0].startswith("unet, batch 1: ours"), "ten times as far from what is right as the peer"


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path, fake: type[Fake]) -> None:
    """Eight pictures would leave nothing for compiling, which then is ended with the time."""
    import gpu_generation

    one = bench(tmp_path, 9)
    one.run(gpu_generation.ROWS)
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    left = {left["row"]: left["why"] for left in found["left_out"]}
    assert "image, batch 8" in left
    assert left["image, batch 8"].startswith("it takes about")
    assert {row["row"] for row in found["rows"]} >= {"image, batch 1", "unet, batch 1", "decode, batch 1"}
    assert Fake.clock.now <= 9 * 60
    cut = bench(tmp_path, (Fake.clock.now + 100) / 60, peers="compiled")
    cut.rows.began = 0.0
    cut.run(gpu_generation.ROWS[-1:])
    assert cut.rows.left_out[0] == {
        "row": "image, batch 1, compiled, diffusers-compiled",
        "why": "diffusers-compiled was not done in time and was ended",
    }


def test_compiling_can_have_all_the_time(tmp_path: Path, fake: type[Fake]) -> None:
    import gpu_generation

    one = bench(tmp_path, 60, peers="compiled")
    one.run(gpu_generation.ROWS)
    assert {row["row"] for row in one.rows.rows} == {"image, batch 1, compiled"}
    ours = bench(tmp_path, 60, peers="")
    ours.run(gpu_generation.ROWS)
    assert {row["side"] for row in ours.rows.rows} == {"sdxl", "sdxl-med"}


def test_a_side_that_fails_takes_no_other_with_it(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_generation

    monkeypatch.setattr(Fake, "fails", ("diffusers-default",))
    one = bench(tmp_path, 60, peers="default")
    one.run(gpu_generation.ROWS[:1])
    assert {row["side"] for row in one.rows.rows} == {"sdxl", "sdxl-med"}
    assert one.rows.left_out[0]["row"] == "image, batch 1, diffusers-default"


def test_without_diffusers_ours_are_there(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_generation

    monkeypatch.setattr(gpu_generation, "missing", lambda *names: "diffusers is not installed")
    one = bench(tmp_path, 60)
    one.run(gpu_generation.ROWS)
    assert {row["side"] for row in one.rows.rows} == {"sdxl", "sdxl-med"}
    assert {row["from"] for row in one.rows.rows if row["row"] == "unet, batch 1"} == {"sdxl in fp32"}
    assert {left["why"] for left in one.rows.left_out} == {"diffusers is not installed"}
