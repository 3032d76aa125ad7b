"""Several processes are one: the same losses, weights and averages within rounding, however they share the model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sdxl_cli.training.state import load_state

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
Arguments = dict[str, Any]


@pytest.fixture(scope="module")
def given(manifest: Path, vae_file: Path, latents: Path) -> Arguments:
    """Seven pictures in two sizes, in batches of 6: every second step of a size is short."""
    return {
        "data": str(manifest),
        "vae": str(vae_file),
        "cache": str(latents),
        "accumulate": 2,
        "max_steps": 4,
    }


def launched(processes: int, name: str, arguments: Arguments, *, restarts: int = 0) -> tuple[int, str]:
    """Exit code and what was said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--master-port", str(port), "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    command = [*(torchrun if processes > 1 else [sys.executable]), str(WORKER), name, json.dumps(arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def trained(processes: int, name: str, arguments: Arguments) -> None:
    code, said = launched(processes, name, arguments)
    assert code == 0, said[-4000:]


def assert_close(one: Path, other: Path, tolerance: float = 2e-6) -> None:
    """Weights, averages and losses differ by rounding."""
    (first, _), (second, _) = load_state(one), load_state(other)
    names = [name for name in first if not name.startswith("random.")]
    assert names == [name for name in second if not name.startswith("random.")]
    far = {
        name: distance
        for name in names
        if name.startswith(("weights.", "ema."))
        and (distance := far_off(first[name], second[name])) > tolerance
    }
    assert not far, f"{len(far)} of {len(names)}: {sorted(far.items(), key=lambda item: -item[1])[:5]}"
    for mine, theirs in zip(lines(one), lines(other), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["images"] == theirs["images"]
        for key in mine.keys() - {"images_per_second"}:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5), key


def far_off(one: Tensor, other: Tensor) -> float:
    """The difference in units of the largest value."""
    scale = one.abs().max()
    return float((one - other).abs().max() / scale) if scale else float(other.abs().max())


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(given: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process that the others are compared with."""
    root = tmp_path_factory.mktemp("alone")
    common = {"data": given["data"], "max_steps": 4, "log_every": 1}
    trained(
        1,
        "several",
        {
            "runs": [
                ("unet", given | {"output": str(root / "unet"), "batch_size": 6, "log_every": 1}),
                ("vae", common | {"output": str(root / "vae"), "batch_size": 6, "pixels_per_step": 0}),
            ]
        },
    )
    return root


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_are_one(processes: int, given: Arguments, alone: Path, tmp_path: Path) -> None:
    size = {"batch_size": 6 // processes, "log_every": 1}
    runs = [
        ("unet", given | size | {"output": str(tmp_path / kind), "distributed": kind})
        for kind in ("ddp", "fsdp")
    ]
    vae = {"data": given["data"], "max_steps": 4, "output": str(tmp_path / "vae"), "pixels_per_step": 0}
    runs.append(("vae", vae | size))
    trained(processes, "several", {"runs": runs})
    for kind in ("ddp", "fsdp"):
        assert_close(alone / "unet", tmp_path / kind)
    assert_close(alone / "vae", tmp_path / "vae")
