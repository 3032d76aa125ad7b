"""What is refused before processes are joined, where they meet, and where the lines of a run go."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdxl_cli.errors import UsageError
from sdxl_cli.training.config import LoopConfig, OptimizerConfig, UNetTrainConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.metrics import Log, Mean
from sdxl_cli.training.parallel import kind_of, mesh_of
from sdxl_cli.training.session import Session, Share, session, share_of
from sdxl_cli.training.trackers import require_trackers
from sdxl_cli.training.vae_config import VAETrainConfig
from sdxl_cli.training.world import World, fresh, world_of

CPU = torch.device("cpu")
TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_sharing_needs_torchrun(kind: Any) -> None:
    with pytest.raises(UsageError, match=rf"--distributed {kind} needs the processes of torchrun: torchrun"):
        world_of(LoopConfig(distributed=kind, device="cpu")).__enter__()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distributed": "off"}, "torchrun started 2 processes; leave --distributed off out"),
        ({"device": "cuda:1"}, "--device cuda:1 cannot be shared by 2 processes"),
        ({"device": "cuda"}, r"2 processes have \d+ CUDA devices here"),
    ],
)
def test_what_two_processes_cannot_do(
    changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        world_of(LoopConfig(**changes)).__enter__()


def test_optimizers_that_need_whole_weights_are_not_sharded() -> None:
    config = LoopConfig(distributed="fsdp", optimizer=OptimizerConfig(name="prodigy", learning_rate=1.0))
    with pytest.raises(UsageError, match=r"prodigy needs whole weights.*use adamw, or --distributed ddp"):
        kind_of(config, World(0, 2, joined=True))
    assert kind_of(replace(config, distributed="auto"), World(0, 2, joined=True)) == "ddp"
    assert kind_of(replace(config, distributed="auto"), World()) == "off"


def test_groups_are_of_one_size() -> None:
    with pytest.raises(UsageError, match="shard_size 4 does not divide 6 processes"):
        mesh_of(LoopConfig(distributed="hsdp", shard_size=4), World(0, 6, joined=True), CPU)
    with pytest.raises(UsageError, match="shard_size goes with"):
        LoopConfig(shard_size=2)


def test_autoencoders_are_not_sharded(tmp_path: Path) -> None:
    config = VAETrainConfig(loop=LoopConfig(distributed="fsdp"))
    with pytest.raises(UsageError, match="--distributed fsdp shards a whole U-Net"):
        session(tmp_path, config, resume=False, shards=False).__enter__()


def test_a_run_keeps_its_batches_unless_told_otherwise() -> None:
    config = LoopConfig(batch_size=4, accumulate=2)
    saved = {"batch_size": 4, "accumulate": 2, "total_batch_size": 0, "began_with": 3}
    assert share_of(config, World(1, 2), saved) == Share(1, 2, began_with=3, parts=2)
    assert share_of(config, World(0, 3), saved) == Share(0, 3, began_with=3, parts=1)
    assert share_of(config, World(0, 8), saved).parts == 1
    other = replace(config, batch_size=5)
    assert share_of(other, World(1, 2), saved) == Share(1, 2, began_with=2, parts=1)


@pytest.mark.parametrize("share", [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_hands_have_every_place_once(share: tuple[int, int]) -> None:
    processes, parts = share
    dealt = [
        place
        for rank in range(processes)
        for part in range(parts)
        for place in range(11)[Share(rank, processes, 4, parts).mine(7 * parts + part)]
    ]
    assert sorted(dealt) == list(range(11))


def test_processes_meet_where_dead_ones_have_met() -> None:
    """The store still has what those before said, who had the same ranks."""
    store = dist.HashStore()
    found: dict[tuple[int, int], bytes] = {}

    def start(attempt: int, rank: int) -> None:
        mine = fresh(store, rank, 3)
        mine.set(str(rank), f"{attempt}")
        mine.set(f"{rank}-ready", "")
        mine.wait([f"{other}-ready" for other in range(3)])
        found[attempt, rank] = b"".join(mine.get(str(other)) for other in range(3))

    for attempt in range(3):
        # rank 0 comes last: the others find the name of those before
        threads = [threading.Thread(target=start, args=(attempt, rank)) for rank in (2, 1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert found == {(attempt, rank): f"{attempt}".encode() * 3 for attempt in range(3) for rank in range(3)}


def test_a_log_is_wound_back_and_goes_on_with_what_was_pending(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def steps(log: Log, *indices: int) -> None:
        for index in indices:
            log.add(index, {"images": 2.0, "loss": float(index), "mse": Mean(index, count=index + 1)})

    whole = Log(tmp_path / "whole.jsonl", 3, 7)
    steps(whole, *range(7))
    first = Log(path, 3, 7)
    steps(first, *range(5))
    pending = json.loads(json.dumps(first.pending()))
    steps(first, 5, 6)
    first.write({"step": 6, "validation_loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    again = Log(path, 3, 7)
    again.rewind(5, pending)
    steps(again, 5, 6)
    lines = [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("whole.jsonl", "metrics.jsonl")
    ]
    for row in (*lines[0], *lines[1]):
        del row["images_per_second"]
    assert lines[0] == lines[1]


class Constant:
    """A loss that falls by itself."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return self.module(torch.ones(1, 1)).square().sum(), {"images": 1.0}

    def describe(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        return {"ids": []}


def test_tensorboard_has_the_lines_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoopConfig(max_steps=4, log_every=2, log_to=("tensorboard",), device="cpu")
    Run(Constant(), config, tmp_path, {}).train()
    longer = Run(Constant(), replace(config, max_steps=6), tmp_path, {})
    longer.resume()
    longer.train()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in curves.Scalars("loss")] == [2, 4, 6]
    assert [event.value for event in curves.Scalars("loss")] == pytest.approx([row["loss"] for row in lines])
    assert "step" not in curves.Tags()["scalars"]


def test_wandb_is_told_the_lines_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the package only what is called is there."""
    told: list[Any] = []

    class Package:
        @staticmethod
        def init(**given: Any) -> type[Package]:
            told.append(given)
            return Package

        @staticmethod
        def define_metric(name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        log = told.append

        @staticmethod
        def finish() -> None:
            told.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Package)  # type: ignore[arg-type]
    config = LoopConfig(max_steps=2, log_every=1, log_to=("wandb",), device="cpu")
    settings = {"loop": {"max_steps": 2}}
    here = Session(torch.device("cpu"), settings=settings)
    Run(Constant(), config, tmp_path, {"task": "none"}, session=here).train()
    first, *rows, last = told
    assert first["config"] == settings
    assert rows == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert last == "finished"
    again = Run(Constant(), replace(config, max_steps=3), tmp_path, {"task": "none"})
    again.resume()
    again.train()
    assert [given["id"] for given in told if isinstance(given, dict) and "id" in given] == [first["id"]] * 2


def test_a_session_has_the_whole_configuration_for_trackers(tmp_path: Path) -> None:
    config = UNetTrainConfig(noise_offset=0.03, loop=LoopConfig(device="cpu"))
    with session(tmp_path / "run", config, resume=False) as here:
        assert here.settings == asdict(config)


def test_a_tracker_that_is_not_installed_is_said_before_anything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"--log-to wandb needs wandb.*pip install 'sdxl-cli\[wandb\]'"):
        require_trackers(("wandb",))
    with pytest.raises(UsageError, match="unknown tracker in log_to 'tensorbord'; did you mean tensorboard"):
        require_trackers(("tensorbord",))


def test_the_bar_says_loss_rate_and_size(tmp_path: Path) -> None:
    log, task = Log(tmp_path / "m.jsonl", 10, 100), Constant()
    log._before -= 2.0
    log.add(0, {"images": 8.0})
    task.size = (768, 1344)  # type: ignore[attr-defined]
    said = log.status(0.25, task)
    assert said.startswith("loss 0.2500, ")
    assert 3.0 < float(said.split(", ")[1].removesuffix(" img/s")) <= 4.0
    assert said.endswith("1344x768")
