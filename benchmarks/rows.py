"""Rows that are kept as they come, within a time: what a run has measured is there when the run is cut off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdxl_cli.checkpoint.atomic import atomic_write

RESERVE = 10.0
"""Seconds that ending takes."""


@dataclass
class Rows:
    """What was measured, what was left out and why, and the time that is left."""

    minutes: float
    path: Path | None
    """JSON, written anew after every row."""
    about: Mapping[str, Any]
    """Of the run: machine, versions, settings."""
    clock: Callable[[], float] = time.monotonic
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self._longest: dict[str, float] = {}
        self.write()

    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - RESERVE - (self.clock() - self.began)

    def allows(self, name: str, kind: str, least: float = 0.0) -> bool:
        """Whether there is time for a row, as long as the longest of its kind so far; if not, that is said.

        Args:
            name: of the row.
            kind: rows of a kind take about as long as each other.
            least: seconds that it takes at least.
        """
        needed = max(least, self._longest.get(kind, 0.0))
        if self.left() > needed:
            return True
        self.leave_out(name, f"it takes about {needed:.0f} s, and {max(self.left(), 0):.0f} s are left")
        return False

    def took(self, kind: str, seconds: float) -> None:
        """How long a row of a kind was."""
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)

    def leave_out(self, name: str, why: str) -> None:
        """Say so, and write it down."""
        print(f"left out: {name}: {why}", flush=True)
        self.left_out.append({"row": name, "why": why})
        self.write()

    def add(self, row: dict[str, Any], said: str = "") -> None:
        """Write a row down, and print it."""
        print(said or "  ".join(_shown(key, value) for key, value in row.items() if value != ""), flush=True)
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """All of it, whole or not at all."""
        if self.path is None:
            return
        seconds = self.clock() - self.began
        found = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            **self.about,
            "seconds": round(seconds, 1),
            "rows": self.rows,
            "left_out": self.left_out,
        }
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _shown(key: str, value: object) -> str:
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


def missing(*packages: str) -> str:
    """Says which of these packages are not installed; empty when all are."""
    gone = [name for name in packages if find_spec(name) is None]
    return f"{' and '.join(gone)} {'are' if gone[1:] else 'is'} not installed" if gone else ""
