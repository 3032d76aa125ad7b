"""The one training loop: step, average, log, save, resume."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdxl_cli.console import get as console
from sdxl_cli.errors import FileError, Interrupted, NumericError
from sdxl_cli.training.config import LoopConfig
from sdxl_cli.training.ema import EMA
from sdxl_cli.training.optimizers import build_adamw, learning_rate
from sdxl_cli.training.state import load_state, save_state


class Task(Protocol):
    """What is trained, and on what: the loop knows neither."""

    @property
    def module(self) -> nn.Module:
        """Parameters that require gradients are trained."""
        ...

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of step ``index``, and numbers for the log.

        The data and all randomness are functions of ``index`` and the generator, which is seeded by the
        run's seed and the step: a resumed run needs no replay.
        """
        ...


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    loss: float = float("nan")
    """Moving average of the loss."""


class Run:
    """A task, its optimizer and averages, in a folder."""

    def __init__(self, task: Task, config: LoopConfig, folder: Path, record: Mapping[str, Any]) -> None:
        """Args:
        task: what is trained.
        config: how long and how.
        folder: for the state and metrics.
        record: kept in the state, to tell what run it was.
        """
        self.task, self.config, self.folder, self.record = task, config, folder, dict(record)
        self.parameters = {n: p for n, p in task.module.named_parameters() if p.requires_grad}
        self.optimizer = build_adamw(self.parameters.values(), config.optimizer)
        self.ema = EMA(self.parameters, config.ema_decay) if config.ema_decay else None
        self.progress = Progress()

    def resume(self) -> None:
        """Go on from the state in the folder.

        Raises:
            FileError: there is none, it is damaged, or it is of another model.
        """
        tensors, values = load_state(self.folder)
        _require_same(values["record"], self.record)
        restore(tensors, self.parameters, self.optimizer, self.ema)
        if self.ema:
            self.ema.updates = values["ema_updates"]
        self.progress = Progress(values["step"], values["loss"])
        console().note(f"resumed {self.folder} at step {self.progress.step}: weights, optimizer, averages")

    def save(self) -> None:
        """Write the state: weights, averages, optimizer, step."""
        values = {
            "step": self.progress.step,
            "loss": self.progress.loss,
            "ema_updates": self.ema.updates if self.ema else 0,
            "record": self.record,
        }
        save_state(self.folder, snapshot(self.parameters, self.optimizer, self.ema), values)

    def averaged(self) -> dict[str, Tensor]:
        """The trained parameters to ship: the averages, or the weights where nothing is averaged."""
        return dict(self.ema.shadow) if self.ema else {n: p.detach() for n, p in self.parameters.items()}

    def train(self) -> None:
        """Run to ``max_steps``, saving as it goes.

        Raises:
            NumericError: the loss is not finite; nothing is saved after that.
            Interrupted: SIGINT or SIGTERM; the step was finished and the state saved.
        """
        done, total = self.progress.step, self.config.max_steps
        with console().bar("training", total=total) as bar, _stop_signals() as stop:
            bar.advance(done)
            log = _Log(self.folder / "metrics.jsonl", self.config)
            for index in range(done, total):
                metrics = self._step(index)
                log.add(index, metrics)
                bar.advance()
                bar.status(f"loss {self.progress.loss:.4f}")
                last = index + 1 == total
                if last or stop.asked or (index + 1) % self.config.save_every == 0:
                    self.save()
                if stop.asked and not last:
                    raise Interrupted(
                        f"stopped after step {index + 1}; the same command with --resume goes on"
                    )

    def _step(self, index: int) -> dict[str, float]:
        config = self.config.optimizer
        generator = torch.Generator("cpu").manual_seed(self.config.seed * 1_000_003 + index)
        loss, metrics = self.task.step(index, generator)
        value = loss.item()
        if not torch.isfinite(loss):
            raise NumericError(f"loss is {value} at step {index}: {metrics}; the last saved state is good")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = config.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        if not torch.isfinite(norm):
            raise NumericError(f"the gradient is {float(norm)} at step {index}; the last saved state is good")
        rate = learning_rate(config, index, self.config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.parameters)
        seen = self.progress.loss
        self.progress = Progress(index + 1, value if seen != seen else 0.98 * seen + 0.02 * value)
        return {"loss": value, "grad_norm": float(norm), "learning_rate": rate, **metrics}


def snapshot(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, Tensor]:
    """Everything a run has in tensors, under names that say what they are."""
    tensors = {f"weights.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    if ema:
        tensors |= {f"ema.{name}": value for name, value in ema.shadow.items()}
    return tensors


def _require_same(saved: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse a state whose record says something else; what it says nothing about is taken as the same."""
    ours = json.loads(json.dumps(record))
    different = sorted(key for key in ours.keys() & saved.keys() if ours[key] != saved[key])
    if different:
        raise FileError(
            f"the saved state is of another run ({', '.join(different)} changed); "
            "start a new one in another --output folder"
        )


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
) -> None:
    """Put a snapshot back.

    Raises:
        FileError: the state does not have these parameters, at these shapes.
    """
    saved = {n.removeprefix("weights.") for n in tensors if n.startswith("weights.")}
    if saved != set(parameters) or any(
        tensors[f"weights.{n}"].shape != p.shape for n, p in parameters.items()
    ):
        raise FileError("the saved state is of another model; start a new run in another --output folder")
    for name, p in parameters.items():
        p.copy_(tensors[f"weights.{name}"])
        prefixed = {key: f"optimizer.{key}.{name}" for key in _OPTIMIZER_STATE}
        moments = {k: _laid_out_as(p, tensors[n]) for k, n in prefixed.items() if n in tensors}
        if moments:
            optimizer.state[p] = moments
        if ema:
            ema.shadow[name].copy_(tensors.get(f"ema.{name}", p))


_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy in the parameter's memory layout: the fused step walks through memory and looks at no strides."""
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter).copy_(value)


class _Log:
    """metrics.jsonl: a line of means every few steps."""

    def __init__(self, path: Path, config: LoopConfig) -> None:
        self.path, self.config = path, config
        self.rows: list[dict[str, float]] = []
        self.since = time.perf_counter()

    def add(self, index: int, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)
        if (index + 1) % self.config.log_every and index + 1 != self.config.max_steps:
            return
        seconds = time.perf_counter() - self.since
        images = sum(row.get("images", 0.0) for row in self.rows)
        means = {key: sum(r[key] for r in self.rows) / len(self.rows) for key in self.rows[0]}
        line = {"step": index + 1, "images_per_second": images / seconds, **means}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: float(f"{v:.6g}") for k, v in line.items()}) + "\n")
        self.rows, self.since = [], time.perf_counter()


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
