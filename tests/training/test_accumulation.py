"""Gradients of several batches in one step."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_cli.errors import FileError, NumericError
from sdxl_cli.training.config import LoopConfig, OptimizerConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.state import load_state

DATA = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
ANSWERS = DATA @ torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])


@dataclass
class Regression:
    """A linear regression on batches that are given; weights as the loader gives them to short batches."""

    batches: list[range]
    batch_size: int
    module: nn.Module = field(default_factory=lambda: nn.Linear(5, 1))

    def __post_init__(self) -> None:
        with torch.no_grad():
            for p in self.module.parameters():
                p.fill_(0.1)

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = list(self.batches[index % len(self.batches)])
        errors = (self.module(DATA[rows])[:, 0] - ANSWERS[rows]).square()
        weight = len(rows) / self.batch_size
        return (weight * errors).mean(), {"images": float(len(rows))}

    def describe(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        return {"ids": [str(row) for row in self.batches[index % len(self.batches)]]}


def config(**changes: Any) -> LoopConfig:
    optimizer = changes.pop("optimizer", OptimizerConfig(learning_rate=0.05))
    return LoopConfig(ema_decay=0.9, log_every=1, device="cpu", optimizer=optimizer, **changes)


def trained(task: Regression, loop: LoopConfig, folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    run = Run(task, loop, folder, {})
    run.train()
    return run.averaged()


def test_batches_in_one_step_are_one_big_batch(tmp_path: Path) -> None:
    big = trained(Regression([range(24)], 24), config(max_steps=5), tmp_path / "one")
    parts = [range(i, i + 6) for i in range(0, 24, 6)]
    small = trained(Regression(parts, 6), config(max_steps=5, accumulate=4), tmp_path / "four")
    for name in big:
        torch.testing.assert_close(small[name], big[name], rtol=1e-5, atol=1e-6)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "four")
    ]
    for one, four in zip(*lines, strict=True):
        assert four["images"] == one["images"] == 24
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_every_image_counts_alike_in_ragged_batches(tmp_path: Path) -> None:
    """6 + 6 + 6 + 2 images: the gradient is that of the sum over all 20, not of the mean of four means."""
    ragged = [range(6), range(6, 12), range(12, 18), range(18, 20)]
    task = Regression(ragged, 6)
    run = Run(
        task, config(max_steps=1, accumulate=4, optimizer=OptimizerConfig(max_grad_norm=0)), tmp_path, {}
    )
    run._gradients(run.players[0], range(4))
    gradient = task.module.get_parameter("weight").grad
    errors = DATA[:20] @ torch.full((5,), 0.1) + 0.1 - ANSWERS[:20]
    torch.testing.assert_close(gradient, (2 * errors[:, None] * DATA[:20]).sum(0)[None] / 24)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_failure_names_the_pictures_of_the_step(where: str, tmp_path: Path) -> None:
    class Spoiled(Regression):
        def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            loss, metrics = super().step(index, generator)
            if index != 3:
                return loss, metrics
            return (loss * float("nan") if where == "loss" else loss + (loss - loss.detach()).sqrt()), metrics

    task = Spoiled([range(2), range(2, 8)], 6)
    said = "of 2, 3, 4 and 3 more" if where == "loss" else "of 0, 1, 2 and 5 more"
    with pytest.raises(NumericError, match=f"{where}.* at step 1, {said}"):
        trained(task, config(max_steps=4, accumulate=2), tmp_path / "run")
    written = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert written["step"] == 1
    assert [len(batch["ids"]) for batch in written["batches"]] == ([6] if where == "loss" else [2, 6])


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path: Path) -> None:
    parts = [range(i, i + 6) for i in range(0, 24, 6)]
    trained(Regression(parts, 6), config(max_steps=2), tmp_path / "run")
    other = config(max_steps=4, optimizer=OptimizerConfig(name="adafactor"))
    again = Run(Regression(parts, 6), other, tmp_path / "run", {})
    with pytest.raises(
        FileError, match="moments of adamw, this run's optimizer is adafactor; give --optimizer adamw"
    ):
        again.resume()


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_a_run_goes_on_with_other_groups_unless_something_was_learned_of_them(
    name: Any, tmp_path: Path
) -> None:
    """Without a decay weights and biases are one group."""
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    parts = [range(i, i + 6) for i in range(0, 24, 6)]
    decayed = OptimizerConfig(name=name, learning_rate=0.05)
    trained(Regression(parts, 6), config(max_steps=2, optimizer=decayed), tmp_path / "run")
    free = config(max_steps=4, optimizer=replace(decayed, weight_decay=0.0))
    again = Run(Regression(parts, 6), free, tmp_path / "run", {})
    if name == "prodigy":
        with pytest.raises(
            FileError, match=r"has 2 groups .* this run 1; give the rates and the weight_decay"
        ):
            again.resume()
    else:
        again.resume()
        again.train()
        assert again.progress.step == 4


@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.05), ("adafactor", 0.05), ("prodigy", 1.0)])
def test_every_optimizer_goes_on_from_its_state_to_the_same_bits(
    name: Any, rate: float, tmp_path: Path
) -> None:
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    optimizer = OptimizerConfig(name=name, learning_rate=rate)
    parts = [range(i, i + 6) for i in range(0, 24, 6)]
    whole = config(max_steps=8, optimizer=optimizer, accumulate=2, ema_every=3)
    one = trained(Regression(parts, 6), whole, tmp_path / "one")
    half = config(max_steps=4, optimizer=optimizer, accumulate=2, ema_every=3)
    trained(Regression(parts, 6), half, tmp_path / "two")
    again = Run(Regression(parts, 6), whole, tmp_path / "two", {})
    again.resume()
    again.train()
    for key, value in again.averaged().items():
        assert torch.equal(value, one[key])
    first, second = (load_state(tmp_path / name) for name in ("one", "two"))
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])
