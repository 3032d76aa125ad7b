"""The one training loop: step, average, log, save, resume."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.stream import require_room
from sdxl_cli.console import get as console
from sdxl_cli.errors import FileError, Interrupted, NumericError
from sdxl_cli.training.config import LoopConfig
from sdxl_cli.training.metrics import IMAGES, Log, summed_images
from sdxl_cli.training.parallel import parallel
from sdxl_cli.training.rates import learning_rate
from sdxl_cli.training.session import Session
from sdxl_cli.training.shards import gathered, whole
from sdxl_cli.training.snapshot import least_size, numbers, restore, snapshot
from sdxl_cli.training.state import STATES, find_state, save_state
from sdxl_cli.training.trackers import trackers
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
        session: Session | None = None,
    ) -> None:
        """Args:
        task: what is trained.
        config: how long and how.
        folder: for the state and metrics.
        record: kept in the state, to tell what run it was.
        watchers: are called after every step, by every process.
        session: the processes; None is one alone.
        """
        self.task, self.config, self.folder, self.record = task, config, folder, dict(record)
        self.session = session or Session(torch.device("cpu"))
        self.world = self.session.world
        turns = turns_of(task)
        assert len(turns) == 1 or not self.session.sharded, (
            "one network is sharded, not two that know each other"
        )
        shared = [parallel(turn.module, config, self.world, self.session.device) for turn in turns]
        self.players = [Player(turn, config, one) for turn, one in zip(turns, shared, strict=True)]
        share = self.session.share
        self.parts = share.parts
        self.batches = config.batches_per_step(share.began_with) * share.parts
        self.log = Log(folder / "metrics.jsonl", config.log_every, config.max_steps, self.world)
        self.watchers = tuple(watchers)
        self.progress = Progress()

    def resume(self) -> None:
        """Go on from the session's state, or the newest in the folder.

        Raises:
            FileError: there is none, it is damaged, or it is of another model.
        """
        state = self.session.state or find_state(self.folder, self.world)
        values = state.values
        _require_same(values["record"], self.record)
        restore(state, self.players, self.world)
        self.progress = Progress(values["step"], values["loss"])
        self.log.rewind(self.progress.step, values["pending"])
        console().note(f"resumed {self.folder} at step {self.progress.step}: weights, optimizer, averages")

    def save(self) -> None:
        """Write the state: weights, averages, optimizer, random numbers, step."""
        values = {
            "step": self.progress.step,
            "loss": self.progress.loss,
            "players": numbers(self.players),
            "pending": self.log.pending(),
            "share": self.session.said(self.config),
            "record": self.record,
        }
        save_state(
            self.folder,
            self.progress.step,
            snapshot(self.players, self.world),
            values,
            keep=self.config.keep_states,
            world=self.world,
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained and shipped, by name; this process's shards where they are sharded."""
        return {n: p for player in self.players if player.turn.averaged for n, p in player.parameters.items()}

    def averaged(self) -> dict[str, Tensor]:
        """The same as averages, or as the weights where nothing is averaged."""
        return {n: v for player in self.players if player.turn.averaged for n, v in player.averages().items()}

    def shipped(self) -> dict[str, Tensor] | None:
        """The averages in whole, in the process that writes files; None in the others. All call it together.

        Where weights are sharded, those that are not trained are in it, too.
        """
        values = self.averaged()
        if self.session.sharded:
            values = {**self.task.module.state_dict(), **values}
        values = gathered(values, self.world)
        return values if self.world.leads else None

    def shown(self) -> AbstractContextManager[nn.Module | None]:
        """The task's module with the averages in it, to look at, in one process; None in the others. All call it
        together.
        """
        return self.players[0].shared.shown(self.averaged())

    def free_gradients(self) -> None:
        """Make room; the next step computes them anew."""
        for player in self.players:
            player.updates.drop()

    def train(self) -> None:
        """Run to ``max_steps``, saving as it goes.

        Raises:
            NumericError: the loss is not finite; nothing is saved after that.
            Interrupted: SIGINT or SIGTERM to one of the processes; the step was finished and the state saved.
        """
        done, total = self.progress.step, self.config.max_steps
        if not done:
            # of whoever draws beside the loop, as dropout does: other numbers in every process
            torch.manual_seed(self.config.seed + 1_000_003 * self.world.rank)
            self.log.rewind(0, [])  # lines of a run that was killed before its first state
        self.world.by_lead(lambda: require_room(self.folder / STATES, least_size(self.players)))
        if self.world.leads:
            self.log.sinks = trackers(self.config.log_to, self.folder, done, self.session.settings)
        with console().bar("training", total=total) as bar, _stop_signals() as stop, self.log:
            bar.advance(done)
            if done:  # who stopped after saving had not looked yet
                self._watched(done)
            for index in range(done, total):
                metrics = self.advance(index)
                self.log.add(index, metrics)
                bar.advance()
                bar.status(self.log.status(self.progress.loss, self.task))
                stopping, last = self.world.any(stop.asked), index + 1 == total
                if last or stopping or (index + 1) % self.config.save_every == 0:
                    self.save()
                if last or not stopping:
                    self._watched(index + 1)
                if stopping and not last:
                    self.world.fail(
                        Interrupted(f"stopped after step {index + 1}; the same command with --resume goes on")
                    )

    def _watched(self, done: int) -> None:
        """Let everybody look; the time it takes is none of the training's."""
        started = time.perf_counter()
        for watcher in self.watchers:
            watcher.after_step(self, done)
        self.log.since += time.perf_counter() - started

    def advance(self, index: int) -> dict[str, float]:
        """Train step ``index``, counted from 0; its metrics, of this process's pictures but for the loss.

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
        rate = learning_rate(config, index, self.config.max_steps)
        player.updates.begin(index, rate)
        losses, metrics = self._gradients(player, batches)
        value = self._mean_loss(index, batches, losses)
        norm = whole(player.updates.norm(config.max_grad_norm))
        if not torch.isfinite(norm):
            self._fail(f"the gradient is {float(norm)}", index, batches)
        player.updates.apply()
        if player.ema:
            player.ema.update(player.parameters)
        return {"loss": value, "grad_norm": float(norm), "learning_rate": rate, **metrics}

    def _gradients(self, player: Player, batches: Sequence[int]) -> tuple[list[float], dict[str, float]]:
        """Add up the gradients of a step's batches; their losses and merged metrics."""
        losses, rows = [], []
        for batch in batches:
            with player.shared.adding_up(batch == batches[-1]):
                loss, metrics = player.shared(player.turn.step, batch, self._generator(batch))
                if self.config.fused_backward and not math.isfinite(loss.item()):
                    return [loss.item()], metrics  # before it is in the weights
                # a batch's weights make it count by its pictures, short or whole: batches are averaged alike
                (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            rows.append(metrics)
            if self.world.size == 1 and not math.isfinite(losses[-1]):
                break
        return losses, summed_images(rows)

    def _mean_loss(self, index: int, batches: Sequence[int], losses: Sequence[float]) -> float:
        """The loss of the step, over all processes, who find together that it is not finite."""
        bad = [float(not math.isfinite(loss)) for loss in losses]
        total, *counts = self.world.sums(sum(losses), *bad)
        if any(counts):
            found = [batch for batch, count in zip(batches, counts, strict=False) if count]
            said = [loss for loss in losses if not math.isfinite(loss)]
            self._fail(f"the loss is {said[0] if said else total}", index, found)
        return total / len(losses) / self.world.size

    def _generator(self, batch: int) -> torch.Generator:
        # the parts of a batch draw from the same: who has which picture makes no difference
        return torch.Generator("cpu").manual_seed(self.config.seed * 1_000_003 + batch // self.parts)

    def _fail(self, what: str, index: int, batches: Sequence[int]) -> NoReturn:
        """Stop for numbers that are not finite; what was trained on is written beside the state."""
        shared, describe = self.players[0].shared, self.task.describe
        mine = [shared(describe, batch, self._generator(batch)) for batch in batches]
        seen = [batch for everybody in self.world.gathered(mine) for batch in everybody]
        path = self.folder / FAILURE_FILE
        if self.world.leads:
            with atomic_write(path) as temporary:
                said = {"step": index, "what": what, "batches": seen}
                temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        ids = [name for batch in seen for name in batch["ids"]]
        self.world.fail(
            NumericError(
                f"{what} at step {index}, of {_few(ids)}; {path} has the numbers; the last saved state is good"
            )
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
