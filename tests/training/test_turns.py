"""Two networks against each other in one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdxl_cli.training.config import LoopConfig, OptimizerConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.state import load_state
from sdxl_cli.training.turns import Turn
from tests.training.files import assert_same_bits

CRITIC = OptimizerConfig(learning_rate=3e-3, betas=(0.5, 0.9))
CONFIG = LoopConfig(
    max_steps=6, accumulate=2, ema_decay=0.9, log_every=1, optimizer=OptimizerConfig(learning_rate=1e-2)
)


class Game:
    """A generator of numbers and a critic with a batch norm, whose running means are part of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(3, 3)
        self.critic = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, 1))

    @property
    def turns(self) -> Sequence[Turn]:
        critic = Turn("critic", self.critic, self.judge, optimizer=CRITIC, averaged=False, since=2)
        return Turn("", self.module, self.step), critic

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        assert not any(p.requires_grad for p in self.critic.parameters())
        return -self.critic(self.module(self._seen(generator)[0])).mean(), {"images": 4.0}

    def judge(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        assert not any(p.requires_grad for p in self.module.parameters())
        noise, real = self._seen(generator)
        loss = F.relu(1 + self.critic(self.module(noise))).mean() + F.relu(1 - self.critic(real)).mean()
        return loss, {"images": 4.0, "real": float(real.mean())}

    def _seen(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise, real = torch.randn(2, 4, 3, generator=generator)
        return noise, real + 2

    def describe(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        return {"ids": []}


def written_out(steps: int) -> Game:
    """The same game without the loop."""
    game = Game()
    first = torch.optim.AdamW(
        [{"params": [game.module.weight]}, {"params": [game.module.bias], "weight_decay": 0.0}],
        lr=1e-2,
        fused=True,
    )
    matrices = [p for p in game.critic.parameters() if p.ndim > 1]
    vectors = [p for p in game.critic.parameters() if p.ndim <= 1]
    second = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.5, 0.9),
        fused=True,
    )
    for index in range(steps):
        for number, optimizer in enumerate((first, second)[: 2 if index >= 2 else 1]):
            for p in (*game.module.parameters(), *game.critic.parameters()):
                p.requires_grad_(True)
            for p in (game.module if number else game.critic).parameters():
                p.requires_grad_(False)
            optimizer.zero_grad()
            for batch in (2 * index, 2 * index + 1):
                generator = torch.Generator().manual_seed(batch)
                (((game.judge if number else game.step)(batch, generator)[0]) / 2).backward()
            moved = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(moved, 1.0)
            optimizer.step()
    return game


def test_turns_are_what_two_optimizers_by_hand_do(tmp_path: Path) -> None:
    game = Game()
    run = Run(game, CONFIG, tmp_path, {})
    run.train()
    expected = written_out(6)
    assert_same_bits(game.module.state_dict(), expected.module.state_dict())
    assert_same_bits(game.critic.state_dict(), expected.critic.state_dict())
    assert run.averaged().keys() == run.parameters.keys() == {"weight", "bias"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["critic_loss" in line for line in lines] == [False] * 2 + [True] * 4
    assert all(line["images"] == 8 for line in lines), "pictures of a step are counted once"
    assert lines[5]["critic_learning_rate"] == 3e-3
    assert {"critic_real", "critic_grad_norm"} <= lines[5].keys()


def test_a_game_in_two_halves_is_the_game_in_one(tmp_path: Path) -> None:
    for name, parts in {"one": (6,), "two": (3, 6)}.items():
        (tmp_path / name).mkdir()
        for steps in parts:
            run = Run(Game(), replace(CONFIG, max_steps=steps), tmp_path / name, {})
            if steps != parts[0]:
                run.resume()
            run.train()
    (one, values), (two, others) = (load_state(tmp_path / name) for name in ("one", "two"))
    assert_same_bits(one, two)
    assert values == others
    assert {"buffers.critic.1.running_mean", "weights.critic.0.weight"} <= one.keys()
    assert "ema.critic.0.weight" not in one
