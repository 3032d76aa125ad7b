"""Several processes are one: the same losses, weights and averages within rounding, however they share the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_cli.training.state import load_state
from tests.training.files import assert_same_bits, tensors

ROOT = Path(__file__).parents[2]
Job = tuple[int, str, dict[str, Any]]

pytestmark = pytest.mark.slow


def jobs(root: Path, given: dict[str, Any]) -> dict[str, Job]:
    """All that this file asks about, by the folder of the run; those that go on with a folder have a dot.

    Seven pictures in two sizes, in batches of 6 from two steps' worth of one size each: most are short.
    """

    def unet(processes: int, folder: str, steps: int, kind: str = "auto", **changes: Any) -> Job:
        arguments = {"output": str(root / folder), "max_steps": steps, "distributed": kind}
        return processes, "unet", given | arguments | {"batch_size": 6 // processes} | changes

    def on(job: Job, name: str, **changes: Any) -> Job:
        return job[0], name, job[2] | changes

    images = {"data": given["data"], "max_steps": 4, "log_every": 1, "pixels_per_step": 0}
    four = {"shard_size": 2, "batch_size": 1}
    return {
        "alone": unet(1, "alone", 4, watched=True),
        "ddp-2": unet(2, "ddp-2", 4, watched=True),
        "ddp-3": unet(3, "ddp-3", 4),
        "fsdp-2": unet(2, "fsdp-2", 4, "fsdp", watched=True),
        "fsdp-3": unet(3, "fsdp-3", 4, "fsdp"),
        "alone-of-4": unet(1, "alone-of-4", 3, batch_size=4),
        "hsdp-4": unet(4, "hsdp-4", 3, "hsdp", **four),
        "vae-3": (3, "vae", images | {"output": str(root / "vae-3"), "batch_size": 2}),
        "vae-of-6": (1, "vae", images | {"output": str(root / "vae-of-6"), "batch_size": 6}),
        "2-to-1": unet(2, "2-to-1", 2, "fsdp"),
        "2-to-1.": unet(1, "2-to-1", 4, resume=True, batch_size=3),
        "2-to-3": unet(2, "2-to-3", 2, "fsdp"),
        "2-to-3.": unet(3, "2-to-3", 4, "fsdp", resume=True, batch_size=3),
        "1-to-2": unet(1, "1-to-2", 2),
        "1-to-2.": unet(2, "1-to-2", 4, "fsdp", resume=True, batch_size=6),
        "2-to-2": unet(2, "2-to-2", 2, "fsdp"),
        "2-to-2.": unet(2, "2-to-2", 4, "fsdp", resume=True),
        "stopped": on(unet(2, "stopped", 4, "fsdp"), "signalled", at=1, rank=1),
        "stopped.": unet(2, "stopped", 4, "fsdp", resume=True),
        "bad-loss": on(unet(2, "bad-loss", 4), "spoiled", at=3, rank=1, where="loss"),
        "bad-gradient": on(unet(2, "bad-gradient", 4, "fsdp"), "spoiled", at=3, rank=1, where="gradient"),
        "no-run": unet(2, "no-run", 4, resume=True),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(root: Path, manifest: Path, vae_file: Path, latents: Path) -> dict[str, tuple[list[int], str]]:
    """What became of each job."""
    given = {
        "data": str(manifest),
        "vae": str(vae_file),
        "cache": str(latents),
        "accumulate": 2,
        "log_every": 1,
    }
    asked = jobs(root, given)
    file = root / "jobs.json"
    file.write_text(json.dumps(list(asked.values())))
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("worker.py")
    done = subprocess.run(
        [sys.executable, str(script), str(file)], env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(asked, json.loads(file.with_suffix(".done").read_text()), strict=True))


@pytest.fixture
def run(root: Path, found: dict[str, tuple[list[int], str]]) -> Callable[[str], Path]:
    """The folder of a run that ended well, in all processes and parts."""

    def folder(name: str) -> Path:
        for part in (name, f"{name}."):
            if part in found:
                codes, said = found[part]
                assert set(codes) == {0}, said[-3000:]
        return root / name

    return folder


def assert_close(one: Path, other: Path) -> None:
    """Weights, averages and what was logged differ by rounding."""
    assert_learned_alike(one, other)
    for mine, theirs in zip(log(one), log(other), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine.get("images") == theirs.get("images")
        for key, value in mine.items():
            assert value == pytest.approx(theirs[key], rel=5e-6), key


def assert_learned_alike(one: Path, other: Path) -> None:
    """Weights and averages, all together to 1e-6; tensors that began at 0 are made of a few small steps."""
    first, second = learned(one), learned(other)
    assert first.keys() == second.keys()
    distance = sum(float((first[n] - second[n]).double().square().sum()) for n in first) ** 0.5
    size = sum(float(tensor.double().square().sum()) for tensor in first.values()) ** 0.5
    assert distance < 1e-6 * size
    far = sorted(((far_off(first[n], second[n]), n) for n in first), reverse=True)
    assert far[0][0] < 2e-5, far[:5]


def learned(folder: Path) -> dict[str, Tensor]:
    """Weights and averages. A bias of all keys alike changes no attention: its gradient is nothing but rounding."""
    state = load_state(folder)[0]
    kinds, keys = ("weights.", "ema."), ("k_proj.bias", "attn_1.k.bias")
    return {n: t for n, t in state.items() if n.startswith(kinds) and not n.endswith(keys)}


def far_off(one: Tensor, other: Tensor) -> float:
    """The difference in units of the largest value."""
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-6)) if one.numel() else 0.0


def log(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


@pytest.mark.parametrize("kind", ["ddp-2", "ddp-3", "fsdp-2", "fsdp-3"])
def test_processes_together_are_one(kind: str, run: Callable[[str], Path]) -> None:
    """Every step has 7 of 12 pictures: the sizes have 5 and 2, and batches are short everywhere."""
    alone = [row for row in log(run("alone")) if "loss" in row]
    assert {row["images"] for row in alone} == {7.0}
    if "3" in kind:  # nobody looks on
        assert log(run(kind)) == [pytest.approx(row, rel=5e-6) for row in alone]
        assert_learned_alike(run("alone"), run(kind))
    else:
        assert_close(run("alone"), run(kind))


def test_groups_that_shard_are_one(run: Callable[[str], Path]) -> None:
    assert_close(run("alone-of-4"), run("hsdp-4"))


def test_an_autoencoders_processes_are_one(run: Callable[[str], Path]) -> None:
    assert_close(run("vae-of-6"), run("vae-3"))


@pytest.mark.parametrize("kind", ["2-to-1", "2-to-3", "1-to-2"])
def test_another_number_of_processes_goes_on(kind: str, run: Callable[[str], Path]) -> None:
    """With the batches that the first number had; each process puts its share through in as many parts as it takes."""
    assert_learned_alike(run("alone"), run(kind))
    expected = [row for row in log(run("alone")) if "loss" in row]
    assert log(run(kind)) == [pytest.approx(row, rel=5e-6) for row in expected]


@pytest.mark.parametrize("kind", ["2-to-2", "stopped"])
def test_the_same_number_of_processes_goes_on_to_the_same_bits(
    kind: str, root: Path, run: Callable[[str], Path], found: dict[str, tuple[list[int], str]]
) -> None:
    if kind == "stopped":
        codes, said = found.pop("stopped")
        assert codes == [130, 130], said
        assert said.count("stopped after step 2; the same command with --resume goes on") == 1
    (whole, _), (parts, _) = load_state(run("fsdp-2")), load_state(run(kind))
    assert_same_bits(
        {n: t for n, t in whole.items() if not n.startswith("random.")},
        {n: t for n, t in parts.items() if not n.startswith("random.")},
    )
    assert log(run(kind)) == [row for row in log(run("fsdp-2")) if "loss" in row]
    assert_same_bits(
        tensors(root / kind / "model.safetensors"), tensors(root / "fsdp-2" / "model.safetensors")
    )


def test_one_process_writes_files_and_looks_on(run: Callable[[str], Path]) -> None:
    from PIL import Image

    for kind in ("ddp-2", "fsdp-2"):
        one, two = run("alone"), run(kind)
        names = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file() and "state" not in p.parts}
        assert names == {
            str(p.relative_to(two)) for p in two.rglob("*") if p.is_file() and "state" not in p.parts
        }
        assert {"model-000002.safetensors", "samples/000004-0.png", "samples/commands.txt"} <= names
        first, second = (tensors(folder / "model-000002.safetensors") for folder in (one, two))
        assert first.keys() == second.keys()
        near = [name for name in first if not name.endswith(("k_proj.bias", "in_proj_bias"))]
        assert max(far_off(first[name].float(), second[name].float()) for name in near) < 2e-5
        a, b = (Image.open(folder / "samples/000004-0.png") for folder in (one, two))
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize(
    ("kind", "what"), [("bad-loss", "the loss is nan"), ("bad-gradient", "the gradient is ")]
)
def test_numbers_of_one_process_that_are_not_finite_stop_all(
    kind: str, what: str, root: Path, found: dict[str, tuple[list[int], str]]
) -> None:
    codes, said = found[kind]
    assert codes == [4, 4], said
    assert said.count("sdxl: ") == 1
    assert f"{what}" in said
    assert "at step 1" in said
    batches = json.loads((root / kind / "not_finite.json").read_text())["batches"]
    assert len(batches) == (2 if kind == "bad-loss" else 4), "of both processes"
    assert not (root / kind / "state").exists()


def test_errors_before_the_start_are_said_once(found: dict[str, tuple[list[int], str]]) -> None:
    codes, said = found["no-run"]
    assert codes == [2, 2]
    assert said.count("has no run to resume") == 1


def test_every_process_has_random_numbers_of_its_own(run: Callable[[str], Path]) -> None:
    state = load_state(run("ddp-3"))[0]
    own = [state[f"random.cpu.{rank}"] for rank in range(3)]
    assert not any(torch.equal(own[a], own[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
