"""How long each stage of a run takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = {
    "load": "reading weights",
    "text": "text encoders",
    "unet": "U-Net",
    "vae": "autoencoder",
    "save": "writing pictures",
}
"""Stages in the order they run, and what a table calls them."""


@dataclass(slots=True)
class Timings:
    """Seconds by stage. Time in a stage inside another belongs to the inner one."""

    settle: Callable[[], None] = lambda: None
    """Waits until the device is done, so that no stage pays for the one before it."""
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    """Seconds of every denoising step."""
    _running: list[str] = field(default_factory=list)
    _since: float = 0.0
    _last_step: float | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time until the block ends as ``name``'s."""
        self._charge()
        self._running.append(name)
        self._last_step = self._since if name == "unet" else None
        try:
            yield
        finally:
            self._charge()
            self._running.pop()
            if self._running and self._running[-1] == "unet":
                self._last_step = self._since

    def step(self) -> None:
        """A denoising step is done."""
        self.settle()
        now = self.clock()
        if self._last_step is not None:
            self.steps.append(now - self._last_step)
        self._last_step = now

    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, object]:
        """Every stage's seconds, and of the denoising steps how many and their mean, fastest and slowest."""
        table: dict[str, object] = {name: round(self.seconds.get(name, 0.0), 4) for name in STAGES}
        if self.steps:
            table["steps"] = {
                "count": len(self.steps),
                "mean": round(sum(self.steps) / len(self.steps), 5),
                "min": round(min(self.steps), 5),
                "max": round(max(self.steps), 5),
            }
        return {**table, "total": round(self.total(), 4)}

    def rows(self) -> list[tuple[str, float, str]]:
        """(stage, seconds, remark) of a table."""
        rows = [(STAGES[name], self.seconds[name], "") for name in STAGES if name in self.seconds]
        if self.steps:
            each = f"{len(self.steps)} steps of {sum(self.steps) / len(self.steps):.4g} s"
            spread = f", {min(self.steps):.4g} to {max(self.steps):.4g} s" if len(self.steps) > 1 else ""
            rows = [(n, s, each + spread if n == STAGES["unet"] else r) for n, s, r in rows]
        return [*rows, ("together", self.total(), "")]

    def _charge(self) -> None:
        """What passed since the last look belongs to the innermost stage that runs."""
        self.settle()
        now = self.clock()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
