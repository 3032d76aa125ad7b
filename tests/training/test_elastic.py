"""torchrun itself: a process dies, all begin anew, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdxl_cli.training.state import load_state, states

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("elastic.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]


def run(folder: Path, before: list[str], kind: str, at: int) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, *before, str(SCRIPT), str(folder), kind, str(at)]
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_a_process_dies_and_the_run_ends_as_if_it_had_not(tmp_path: Path) -> None:
    run(tmp_path / "alone", [], "auto", -1)
    said = run(tmp_path / "elastic", [*TORCHRUN, "--monitor-interval", "0.1"], "fsdp", 5)
    assert said.count("resumed") == 1, "by one process, without being asked to"
    assert "at step 3: weights" in said
    assert [path.name for path in states(tmp_path / "elastic")] == ["step-00000008", "step-00000006"]
    (one, values), (other, others) = (load_state(tmp_path / name) for name in ("alone", "elastic"))
    assert values["step"] == others["step"] == 8
    for name in (name for name in one if not name.startswith("random.")):
        torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-6)
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "elastic")
    )
    assert [row["step"] for row in second] == [2, 4, 6, 8]
    for a, b in zip(first, second, strict=True):
        assert b["images"] == a["images"] == 6
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
