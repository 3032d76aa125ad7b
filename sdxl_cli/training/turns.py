"""What moves in a step: one module with its optimizer, or several that take turns, as a GAN's two networks do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sdxl_cli.training.config import LoopConfig, OptimizerConfig
from sdxl_cli.training.ema import EMA
from sdxl_cli.training.optimizers import build_optimizer
from sdxl_cli.training.parallel import Alone, Parallel
from sdxl_cli.training.updates import build_updates

Step = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]
"""See :meth:`Task.step`."""


class Task(Protocol):
    """What is trained, and on what: the loop knows neither."""

    @property
    def module(self) -> nn.Module:
        """Parameters that require gradients are trained."""
        ...

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of batch ``index``, and numbers for the log.

        The data and all randomness are functions of ``index`` and the generator, which is seeded by the
        run's seed and the index: a resumed run needs no replay.
        """
        ...

    def describe(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """That batch as JSON values, for who looks into a failure: ``ids`` of pictures, and statistics."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """A part of every step: which module moves in it, and by which loss."""

    name: str
    """Before the turn's parameters in the state and its numbers in the log; the first turn has none, ``""``."""
    module: nn.Module
    """Parameters that require gradients when the run begins are trained; in other turns they stand still."""
    step: Step
    """The loss; it gets the same index and the same randomness as the turns before it in the step."""
    optimizer: OptimizerConfig | None = None
    """None: the loop's."""
    averaged: bool = True
    """Whether the loop's average is kept of it, and it is part of what is shipped."""
    since: int = 0
    """The first step of the run that it takes part in."""


@runtime_checkable
class TakesTurns(Protocol):
    """A task of several turns; ``turns[0]`` is of ``task.module``, whose loss is the run's."""

    @property
    def turns(self) -> Sequence[Turn]:
        """In the order in which they move."""
        ...


def turns_of(task: Task) -> Sequence[Turn]:
    """The task's own turns, or the one of its module."""
    if isinstance(task, TakesTurns):
        assert task.turns[0].name == ""
        return task.turns
    return (Turn("", task.module, task.step),)


class Player:
    """A turn with its optimizer and average."""

    def __init__(self, turn: Turn, config: LoopConfig, shared: Parallel) -> None:
        """``shared`` is the turn's module as the processes share it."""
        self.turn, self.shared = turn, shared
        self.config = turn.optimizer or config.optimizer
        before = f"{turn.name}." if turn.name else ""
        self.parameters = {before + n: p for n, p in turn.module.named_parameters() if p.requires_grad}
        """What is trained, by its name in the state."""
        kept = turn.module.state_dict(keep_vars=True).keys()
        self.buffers = {before + n: b for n, b in turn.module.named_buffers() if n in kept}
        """What changes without gradients, as running means do."""
        self.optimizer = build_optimizer(self.parameters, self.config)
        self.updates = build_updates(
            list(self.parameters.values()),
            self.optimizer,
            self.config,
            config,
            alone=isinstance(shared, Alone),
        )
        self.ema = _average_of(self, config) if turn.averaged else None

    @contextmanager
    def alone(self, others: Sequence[Player]) -> Iterator[None]:
        """Nobody else's parameters get gradients meanwhile."""
        standing = [p for other in others if other is not self for p in other.parameters.values()]
        for p in standing:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in standing:
                p.requires_grad_(True)

    def averages(self) -> dict[str, Tensor]:
        """The averages, or the weights where nothing is averaged."""
        if self.ema:
            return self.ema.current(self.parameters)
        return {name: p.detach() for name, p in self.parameters.items()}


def _average_of(player: Player, config: LoopConfig) -> EMA | None:
    """The average that the configuration asks for."""
    if not config.ema_decay:
        return None
    device = torch.device("cpu") if config.ema_device == "cpu" else None
    return EMA(player.parameters, config.ema_decay, every=config.ema_every, device=device)
