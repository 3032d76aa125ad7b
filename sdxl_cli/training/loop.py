"""The one training loop: step, average, log, save, resume."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.console import get as console
from sdxl_cli.errors import FileError, Interrupted, NumericError
from sdxl_cli.training.config import LoopConfig
from sdxl_cli.training.metrics import IMAGES, Log, summed_images
from sdxl_cli.training.optimizers import set_rate
from sdxl_cli.training.rates import learning_rate
from sdxl_cli.training.snapshot import numbers, restore, snapshot
from sdxl_cli.training.state import load_state, save_state
from sdxl_cli.training.turns import Player, Task, turns_of

FAILURE_FILE = "not_finite.json"


class Watcher(Protocol):
    """Looks on after steps: sample pictures, a validation loss."""

    def after_step(self, run: Run, done: int) -> None:
        """``done`` steps are over; the run is as it was when this returns."""
        ...


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    loss: float = float("nan")
    """Moving average of the loss."""


class Run:
    """A task, its optimizers and averages, in a folder."""

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        folder: Path,
        record: Mapping[str, Any],
        watchers: Sequence[Watcher] = (),
    ) -> None:
        """Args:
        task: what is trained.
        config: how long and how.
        folder: for the state and metrics.
        record: kept in the state, to tell what run it was.
        watchers: are called after every step.
        """
        self.task, self.config, self.folder, self.record = task, config, folder, dict(record)
        self.players = [Player(turn, config) for turn in turns_of(task)]
        self.batches = config.batches_per_step()
        self.log = Log(folder / "metrics.jsonl", config.log_every, config.max_steps)
        self.watchers = tuple(watchers)
        self.progress = Progress()

    def resume(self) -> None:
        """Go on from the state in the folder.

        Raises:
            FileError: there is none, it is damaged, or it is of another model.
        """
        tensors, values = load_state(self.folder)
        _require_same(values["record"], self.record)
        restore(tensors, values["players"], self.players)
        self.progress = Progress(values["step"], values["loss"])
        console().note(f"resumed {self.folder} at step {self.progress.step}: weights, optimizer, averages")

    def save(self) -> None:
        """Write the state: weights, averages, optimizer, step."""
        values = {
            "step": self.progress.step,
            "loss": self.progress.loss,
            "players": numbers(self.players),
            "record": self.record,
        }
        save_state(self.folder, snapshot(self.players), values)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained and shipped, by name."""
        return {n: p for player in self.players if player.turn.averaged for n, p in player.parameters.items()}

    def averaged(self) -> dict[str, Tensor]:
        """The same as averages, or as the weights where nothing is averaged."""
        return {n: v for player in self.players if player.turn.averaged for n, v in player.averages().items()}

    def free_gradients(self) -> None:
        """Make room; the next step computes them anew."""
        for player in self.players:
            player.optimizer.zero_grad(set_to_none=True)

    def train(self) -> None:
        """Run to ``max_steps``, saving as it goes.

        Raises:
            NumericError: the loss is not finite; nothing is saved after that.
            Interrupted: SIGINT or SIGTERM; the step was finished and the state saved.
        """
        done, total = self.progress.step, self.config.max_steps
        with console().bar("training", total=total) as bar, _stop_signals() as stop:
            bar.advance(done)
            for index in range(done, total):
                metrics = self.advance(index)
                self.log.add(index, metrics)
                bar.advance()
                bar.status(f"loss {self.progress.loss:.4f}")
                last = index + 1 == total
                if last or stop.asked or (index + 1) % self.config.save_every == 0:
                    self.save()
                if last or not stop.asked:
                    self._watched(index + 1)
                if stop.asked and not last:
                    raise Interrupted(
                        f"stopped after step {index + 1}; the same command with --resume goes on"
                    )

    def _watched(self, done: int) -> None:
        """Let everybody look; the time it takes is none of the training's."""
        started = time.perf_counter()
        for watcher in self.watchers:
            watcher.after_step(self, done)
        self.log.since += time.perf_counter() - started

    def advance(self, index: int) -> dict[str, float]:
        """Train step ``index``, counted from 0; its metrics.

        Raises:
            NumericError: the loss or the gradient is not finite.
        """
        batches = range(index * self.batches, (index + 1) * self.batches)
        said: dict[str, float] = {}
        for player in self.players:
            if index < player.turn.since:
                continue
            with player.alone(self.players):
                metrics = self._move(player, index, batches)
            name = player.turn.name
            said |= {f"{name}_{key}": v for key, v in metrics.items() if key != IMAGES} if name else metrics
        value, before = said["loss"], self.progress.loss
        self.progress = Progress(index + 1, value if before != before else 0.98 * before + 0.02 * value)
        return said

    def _move(self, player: Player, index: int, batches: Sequence[int]) -> dict[str, float]:
        """One optimizer's step; its metrics."""
        config = player.config
        player.optimizer.zero_grad(set_to_none=True)
        value, metrics = self._gradients(player, index, batches)
        limit = config.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(player.parameters.values(), limit)
        if not torch.isfinite(norm):
            raise self._failure(f"the gradient is {float(norm)}", index, batches)
        rate = learning_rate(config, index, self.config.max_steps)
        set_rate(player.optimizer, rate)
        player.optimizer.step()
        if player.ema:
            player.ema.update(player.parameters)
        return {"loss": value, "grad_norm": float(norm), "learning_rate": rate, **metrics}

    def _gradients(
        self, player: Player, index: int, batches: Sequence[int]
    ) -> tuple[float, dict[str, float]]:
        """Add up the gradients of a step's batches; their mean loss and merged metrics."""
        losses, rows = [], []
        for batch in batches:
            loss, metrics = player.turn.step(batch, self._generator(batch))
            losses.append(loss.item())
            rows.append(metrics)
            if not math.isfinite(losses[-1]):
                raise self._failure(f"the loss is {losses[-1]}", index, [batch])
            # a batch's weights make it count by its pictures, short or whole: batches are averaged alike
            (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        return sum(losses) / len(losses), summed_images(rows)

    def _generator(self, batch: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self.config.seed * 1_000_003 + batch)

    def _failure(self, what: str, index: int, batches: Sequence[int]) -> NumericError:
        """The error for numbers that are not finite; what was trained on is written beside the state."""
        path = self.folder / FAILURE_FILE
        seen = [self.task.describe(batch, self._generator(batch)) for batch in batches]
        with atomic_write(path) as temporary:
            said = {"step": index, "what": what, "batches": seen}
            temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        ids = [name for batch in seen for name in batch["ids"]]
        return NumericError(
            f"{what} at step {index}, of {_few(ids)}; {path} has the numbers; the last saved state is good"
        )


def _few(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return ", ".join(ids[:3]) + more


def _require_same(saved: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse a state whose record says something else; what it says nothing about is taken as the same."""
    ours = json.loads(json.dumps(record))
    different = sorted(key for key in ours.keys() & saved.keys() if ours[key] != saved[key])
    if different:
        raise FileError(
            f"the saved state is of another run ({', '.join(different)} changed); "
            "start a new one in another --output folder"
        )


class _Stop:
    asked = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM ask for a stop after the step; a second one acts at once."""
    stop = _Stop()
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, frame: object) -> None:
        stop.asked = True
        signal.signal(number, before[signal.Signals(number)])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
