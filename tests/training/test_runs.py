"""Whole runs as the commands make them: stopped and gone on with, to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_cli.errors import Interrupted, NumericError
from sdxl_cli.training import unet_task
from sdxl_cli.training.loop import Run
from sdxl_cli.training.state import load_state, states
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from tests.training.files import Train, assert_same_bits, tensors
from tests.training.small import unet_config


def assert_same_runs(one: Path, other: Path) -> None:
    """States (weights, averages, moments) and results have the same bits."""
    (first, values), (second, others) = load_state(one), load_state(other)
    assert_same_bits(first, second)
    assert values == others
    for path in one.glob("*.safetensors"):
        assert_same_bits(tensors(path), tensors(other / path.name))


def contents(folder: Path) -> dict[str, bytes]:
    """All states of a run."""
    return {str(path): path.read_bytes() for path in states(folder)[0].rglob("*.*")}


def test_a_run_in_two_halves_is_the_run_in_one(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "whole", 6, False)
    train(tmp_path / "halves", 3, False)
    train(tmp_path / "halves", 6, True)
    assert_same_runs(tmp_path / "whole", tmp_path / "halves")


def test_the_state_has_averages_and_moments_that_are_not_the_weights(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "run", 3, False)
    state, values = load_state(tmp_path / "run")
    names = [name.removeprefix("ema.") for name in state if name.startswith("ema.")]
    moving = [name for name in names if f"optimizer.exp_avg.{name}" in state]
    assert len(moving) > 20
    assert any(not torch.equal(state[f"ema.{name}"], state[f"weights.{name}"]) for name in moving)
    assert {float(state[f"optimizer.step.{name}"]) for name in moving} == {3.0}
    assert (values["step"], values["players"][0]["ema_updates"]) == (3, 3)


def test_a_stop_is_asked_for_by_a_signal_and_gone_on_from(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is finished and saved; another ``--resume`` gives what an undisturbed run gives."""
    original = Run.advance

    def step(self: Run, index: int) -> dict[str, float]:
        if index == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, index)

    train(tmp_path / "whole", 5, False)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", step)
        with pytest.raises(Interrupted, match=r"step 3.*--resume") as stopped:
            train(tmp_path / "stopped", 5, False)
    assert stopped.value.exit_code == 130
    assert load_state(tmp_path / "stopped")[1]["step"] == 3
    assert not list((tmp_path / "stopped").glob("[!s]*.safetensors")), "nothing is shipped before the end"
    train(tmp_path / "stopped", 5, True)
    assert_same_runs(tmp_path / "whole", tmp_path / "stopped")


def test_signals_mean_again_what_they_meant_before(train: Train, tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train(tmp_path / "run", 1, False)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_failure_while_saving_leaves_the_last_good_state(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill would: bytes of the new state are on disk, its name is not yet on them."""
    folder = tmp_path / "run"
    train(folder, 3, False)
    good = contents(folder)

    def stops_halfway(file: Any, pending: Any) -> str:
        file.write(next(iter(pending)).make().contiguous().numpy().tobytes()[:100])
        file.flush()
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("sdxl_cli.checkpoint.stream._write_all", stops_halfway)
        with pytest.raises(RuntimeError, match="killed"):
            train(folder, 6, True)
    assert contents(folder) == good
    train(folder, 6, True)
    train(tmp_path / "whole", 6, False)
    assert_same_runs(tmp_path / "whole", folder)


def test_a_run_killed_before_its_first_state_leaves_no_lines(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 9.0}\n{"step": 4, "loss": 9.0}\n{"st')
    train(folder, 2, False)
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2
    assert json.loads(line)["loss"] != 9.0


def test_a_leftover_of_a_killed_save_disturbs_nobody(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, 3, False)
    left = folder / "state" / ".step-00000006.partial"
    left.mkdir()
    (left / ".part-00000.0123abcd.partial.safetensors").write_bytes(b"half a st")
    train(folder, 6, True)
    train(tmp_path / "whole", 6, False)
    assert_same_runs(tmp_path / "whole", folder)
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_spares_the_state(
    where: str, request_: UNetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = unet_task.weighted_mse

    def spoiled(*args: Any) -> Any:
        loss, per_sample = original(*args)
        if where == "loss":
            return loss * float("nan"), per_sample
        # a finite value whose slope is infinite
        return loss + (loss - loss.detach()).sqrt(), per_sample

    first = replace(request_, config=unet_config(max_steps=3))
    train_unet(first)
    good = contents(request_.output)
    monkeypatch.setattr(unet_task, "weighted_mse", spoiled)
    with pytest.raises(NumericError, match=r"at step 3.*the last saved state is good") as error:
        train_unet(replace(request_, resume=True, config=unet_config(save_every=1)))
    assert error.value.exit_code == 4
    assert where in str(error.value)
    assert contents(request_.output) == good


@pytest.mark.slow
def test_a_terminated_program_saves_and_exits_with_130(request_: UNetRequest, tmp_path: Path) -> None:
    code = (
        "import runpy; from sdxl_cli import cli; from sdxl_cli.model.config import CONFIGS\n"
        f"CONFIGS['small'] = runpy.run_path({str(Path(__file__).with_name('small.py'))!r})['SMALL']\ncli.main()"
    )
    sets = ["model=small", "train_text_encoders=true", "loop.log_every=1", "loop.save_every=1000000"]
    command = [sys.executable, "-c", code, "train-unet", "-d", str(request_.data), "--vae", str(request_.vae)]
    command += ["-o", "run", "--max-steps", "100000", *(word for s in sets for word in ("--set", s))]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
    ) as program:
        while program.poll() is None and not metrics.exists():
            time.sleep(0.05)
        program.terminate()
        _, said = program.communicate(timeout=60)
    assert program.returncode == 130, said
    assert said.splitlines()[-1].startswith("sdxl: stopped after step ")
    step = load_state(tmp_path / "run")[1]["step"]
    assert step == len(metrics.read_text().splitlines()) >= 1
    assert f"after step {step};" in said
