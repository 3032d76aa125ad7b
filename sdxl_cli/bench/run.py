"""Run the rows and measure them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from sdxl_kernels.graphs import unrecorded

from sdxl_cli.bench.cases import CASES, Case
from sdxl_cli.bench.ceiling import gemm_rate
from sdxl_cli.bench.counting import count
from sdxl_cli.bench.memory import Peak, peak_memory
from sdxl_cli.bench.needs import needed_bytes
from sdxl_cli.bench.setting import CaseName, Setting
from sdxl_cli.bench.timing import Spread, spread, timed
from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.errors import MemoryLimitError, UsageError
from sdxl_cli.generation.device import NAMES
from sdxl_cli.generation.pipeline import Reporter
from sdxl_cli.generation.residency import free_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What was found about one part of the work."""

    name: CaseName
    label: str
    dtype: str
    seconds: Spread | None = None
    """Of one run; None: not run, see ``left_out``."""
    cpu_seconds: Spread | None = None
    unit: str = ""
    per_second: float = 0.0
    """How many of ``unit`` in a second."""
    memory: Peak | None = None
    flops: int = 0
    ops: int = 0
    rate: float = 0.0
    """Counted operations a second."""
    of_ceiling: float = 0.0
    """``rate`` as a share of what plain matrix products reach."""
    left_out: str = ""
    """Why it was not run."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Bench:
    """The rows of a setting, one after the other."""

    def __init__(self, setting: Setting, report: Reporter) -> None:
        self.setting, self.report = setting, report
        self.ceilings: dict[torch.dtype, float] = {}
        """The rate of matrix products by precision, once it was needed."""
        self._medians: dict[CaseName, float] = {}

    def rows(self) -> Iterator[Row]:
        """Run what was asked for, or all that fits in memory and in the budget.

        Raises:
            MemoryLimitError, UsageError: a row that was asked for by name does not fit, or cannot be.
        """
        names = self.setting.request.only or tuple(CASES)
        for name in (name for name in CASES if name in names):
            yield self._row(name)
            self.setting.weights.release()

    def dtype_of(self, name: CaseName) -> torch.dtype:
        """What a row computes in: that of the part that takes longest."""
        weights = self.setting.weights
        if name == "train":
            return weights.dtype if weights.dtype == torch.float32 else torch.bfloat16
        return weights.vae_dtype if name in ("decode", "encode") else weights.dtype

    def ceiling(self, dtype: torch.dtype) -> float:
        """The rate of matrix products, measured once."""
        if dtype not in self.ceilings:
            self.ceilings[dtype] = gemm_rate(dtype, self.setting.weights.device)
        return self.ceilings[dtype]

    def _row(self, name: CaseName) -> Row:
        case, dtype = CASES[name], self.dtype_of(name)
        bare = Row(name=name, label=case.label, dtype=NAMES[dtype])
        if reason := self._obstacle(name, case):
            return replace(bare, left_out=reason)
        with torch.inference_mode(name != "train"), closing(case.prepare(self.setting)) as runs:
            return self._measured(next(runs), case, bare)

    def _measured(self, work: Callable[[], object], case: Case, bare: Row) -> Row:
        device, request = self.setting.weights.device, self.setting.request
        with peak_memory(device) as memory:
            with unrecorded():
                done = count(work)  # also the run that warms up
            if device.type == "cuda":
                work()  # what is recorded is recorded now
        samples, started = [], time.perf_counter()
        for _ in self.report.progress(range(request.repeats), case.label):
            samples.append(timed(work, device))
            if time.perf_counter() - started > request.budget:
                break
        seconds = spread([sample.seconds for sample in samples])
        self._medians[bare.name] = seconds.median
        rate = done.flops / seconds.median
        return replace(
            bare,
            seconds=seconds,
            cpu_seconds=spread([sample.cpu_seconds for sample in samples]),
            unit=case.unit,
            per_second=case.count(self.setting) / seconds.median,
            memory=memory,
            flops=done.flops,
            ops=done.ops,
            rate=rate,
            of_ceiling=rate / self.ceiling(self.dtype_of(bare.name)),
        )

    def _obstacle(self, name: CaseName, case: Case) -> str:
        """Why a row is not run; empty when it is.

        Raises:
            MemoryLimitError, UsageError: it was asked for by name and does not fit, or cannot be.
        """
        setting = self.setting
        asked = name in setting.request.only
        if name == "image" and setting.files.config.is_refiner:
            if asked:
                raise UsageError("--only image: a refiner makes no picture from nothing; give a base")
            return "a refiner makes no picture from nothing"
        if name == "image" and not setting.files.components and not setting.weights.stays:
            return self._no_room("--random-weights has to keep all parts in memory at once", asked)
        need, free = needed_bytes(name, setting), free_bytes(setting.weights.device)
        if free is not None and need > free:
            return self._no_room(f"needs {format_bytes(need)}, {format_bytes(free)} are free", asked)
        steps = self._medians.get("unet", 0.0) * setting.plan.steps
        if name == "image" and not asked and steps > setting.request.budget:
            return f"would take about {_minutes(2 * steps)}; --only image runs it"
        return ""

    def _no_room(self, reason: str, asked: bool) -> str:
        if asked:
            raise MemoryLimitError(
                f"{reason}; take a smaller --size, --batch or --model, or a narrower --dtype"
            )
        return reason


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
