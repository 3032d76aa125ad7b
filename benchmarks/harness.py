"""Contestants, rounds in turns, and what is written down of them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from child import Answer, Child
from job import Job, relative
from random_folder import write_folder
from safetensors.torch import load_file

from sdxl_cli.bench.timing import Spread, ratio, spread
from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.generation.device import DTYPES
from sdxl_cli.model.config import CONFIGS

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
OURS = "sdxl"
GIB = 1 << 30


class Contestant(Child):
    """A side in its own process, which is there from the first word to the last."""

    def __init__(self, name: str, job: Job) -> None:
        """``name`` is ``side`` or ``side-variant``. It loads what the job needs, while others do, too."""
        side, _, variant = name.partition("-")
        ready = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
        command = [str(HERE / "contestant.py"), side, variant or "default", job.to_text()]
        super().__init__(name, command, ready)
        self._loaded: Answer | None = None

    @property
    def loaded(self) -> Answer:
        """What it says when it is ready."""
        return self.ready()

    def ready(self, within: float | None = None) -> Answer:
        """Wait for that, at most so many seconds."""
        if self._loaded is None:
            self._loaded = self.answer(within)
        return self._loaded

    def ask(self, do: str, *, within: float | None = None, **more: Any) -> Answer:
        """See :class:`~child.Child`."""
        self.ready(within)
        return super().ask(do, within=within, **more)


@dataclass
class Result:
    """What a side did in all rounds."""

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)
    first: float | None = None
    """Seconds of a run before the rounds, in which weights are read, steps recorded and code compiled."""
    error: float | None = None
    """Relative to the reference."""

    def add(self, found: dict[str, Any]) -> None:
        self.seconds.append(found["seconds"])
        self.cpu.append(found["cpu"])
        for name, value in found["memory"].items():
            self.memory[name] = max(self.memory.get(name, 0), value)


@dataclass
class Comparison:
    """All sides at one job."""

    job: Job
    results: list[Result]
    ceiling: float
    """Operations a second of plain matrix products."""
    reference: str
    """What the errors are measured against; empty: nothing."""

    def ratio(self, result: Result, *, cpu: bool = False) -> Spread:
        """How many times longer than ours it took."""
        ours = self.results[0]
        return ratio(ours.cpu, result.cpu) if cpu else ratio(ours.seconds, result.seconds)


def compare(
    job: Job, names: Sequence[str], rounds: int, *, counts: bool, reference: str = "", alone: bool = False
) -> Comparison:
    """Let sides do a job in turns, A B B A.

    Args:
        job: what.
        names: of the sides; the first is ours.
        rounds: how often.
        counts: whether operations are counted, which takes one run more of each.
        reference: precision in which diffusers says what is right, in a run of its own before; empty: none.
        alone: load each side anew for each of its rounds, so that only one is in memory at a time.
    """
    results = {name: Result(name) for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if reference:
            _say(f"{job.kind}: {reference} reference")
            judge = Contestant("diffusers", replace(job, dtype=reference))
            judge.ask("run", save=str(place / "reference"))
            judge.close()
        if alone:
            ceiling = _alone(job, results, rounds, counts, place)
        else:
            ceiling = _together(job, results, rounds, counts, place)
        right = place / ("reference" if reference else names[0])
        for name, result in results.items():
            if reference or name != names[0]:
                result.error = relative(*(load_file(path)["out"] for path in (place / name, right)))
    return Comparison(
        job, list(results.values()), ceiling, (reference and f"diffusers in {reference}") or names[0]
    )


def _together(job: Job, results: dict[str, Result], rounds: int, counts: bool, place: Path) -> float:
    sides = {name: Contestant(name, job) for name in results}
    ceiling = 0.0
    for name, side in sides.items():
        results[name].loaded = side.loaded
        if counts:
            _say(f"{job.kind}: counting {name}")
            results[name].counted = side.ask("count")
        ceiling = ceiling or side.ask("ceiling", dtype=job.dtype)["rate"]
        results[name].first = _first(side, job)
    for number in range(rounds):
        for name in _turn(list(sides), number):
            results[name].add(sides[name].ask("run", save=str(place / name)))
            _say(f"{job.kind}: round {number + 1} of {rounds}, {name} {results[name].seconds[-1]:.3f} s")
    for side in sides.values():
        side.close()
    return ceiling


def _alone(job: Job, results: dict[str, Result], rounds: int, counts: bool, place: Path) -> float:
    ceiling = 0.0
    for number in range(rounds):
        for name in _turn(list(results), number):
            side, result = Contestant(name, job), results[name]
            result.loaded = side.loaded
            ceiling = ceiling or side.ask("ceiling", dtype=job.dtype)["rate"]
            if counts and not result.counted:
                result.counted = side.ask("count")
            result.first = _first(side, job)
            result.add(side.ask("run", save=str(place / name)))
            _say(f"{job.kind}: round {number + 1} of {rounds}, {name} {result.seconds[-1]:.3f} s")
            side.close()
    return ceiling


def _first(side: Contestant, job: Job) -> float | None:
    """The run before the rounds; on a CPU the parts of a picture have nothing to make ready."""
    if job.kind != "image" and job.device == "cpu":
        return None
    return float(side.ask("run")["seconds"])


def _turn(names: list[str], number: int) -> list[str]:
    return names[::-1] if number % 2 else names


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


COLUMNS = (
    "side", "first", "seconds", "from … to", "CPU s", "ours is faster by", "same, in CPU s", "TFLOP", "operations",
    "of peak", "peak GiB", "own GiB: loaded → peak", "difference",
)  # fmt: skip


def table(found: Comparison) -> list[str]:
    """Markdown."""
    job, threads = found.job, found.job.threads
    size = f"{job.width}x{job.height}, batch {job.batch}, {job.dtype}"
    what = f"**{job.kind}** {size}" + (", with a negative prompt" if job.negative else "")
    steps = f", {job.steps} steps" if job.kind == "image" else ""
    peak = f"{found.ceiling / 1e12:.3g} TFLOP/s of plain matrix products"
    lines = [
        f"{what}{steps}; {job.device}, {threads} thread{'s' if threads > 1 else ''}; peak is {peak}; "
        f"difference is relative, from {found.reference}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    return lines + [f"| {' | '.join(_cells(found, result))} |" for result in found.results]


def _cells(found: Comparison, result: Result) -> list[str]:
    seconds, cpu = spread(result.seconds), spread(result.cpu)
    memory, counted = result.memory, result.counted
    first = result is found.results[0]
    flops = counted.get("flops", 0)
    own = f"{memory['own_before'] / GIB:.2f} → {memory['own'] / GIB:.2f}" if memory["own"] else ""
    return [
        result.name,
        "" if result.first is None else f"{result.first:.4g}",
        f"{seconds.median:.4g} ({seconds.count})",
        f"{seconds.low:.4g} … {seconds.high:.4g}",
        f"{cpu.median:.4g}",
        "" if first else said(found.ratio(result)),
        "" if first else said(found.ratio(result, cpu=True)),
        f"{flops / 1e12:.4g}" if flops else "",
        str(counted.get("ops", "")),
        f"{flops / seconds.median / found.ceiling:.0%}" if flops else "",
        f"{max(memory['most'], memory['reserved']) / GIB:.2f}",
        own,
        "" if result.error is None else f"{result.error:.1e}",
    ]


def said(value: Spread) -> str:
    """A ratio with its interval; that there is none to be seen, where the interval has 1 in it."""
    interval = f"{value.low:.2f} … {value.high:.2f}"
    return (
        f"{value.median:.2f}x, {interval}" if not value.low <= 1 <= value.high else f"none seen, {interval}"
    )


def flags(about: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """What every comparison can be told; ``about`` is the script's docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "base"), default="tiny")
    parser.add_argument(
        "--weights", type=Path, help="folder of the random weights; made where they are missing"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--write", action="store_true", help="add the tables to RESULTS.md")
    return parser


def weights_of(args: argparse.Namespace) -> Path:
    """The folder of the random weights that :func:`flags` name, with what was missing. A GPU draws other numbers."""
    kind = args.device.partition(":")[0]
    name = f"{args.model}-{args.dtype}" + ("" if kind == "cpu" else f"-{kind}")
    folder = args.weights or Path.home() / ".cache" / "sdxl" / "benchmarks" / name
    write_folder(folder, CONFIGS[args.model], DTYPES[args.dtype], args.device)
    return Path(folder)


def heading(machine: dict[str, Any], title: str) -> list[str]:
    """When, where and how, for RESULTS.md."""
    shown = {k: format_bytes(v) if k.endswith("memory") else v for k, v in machine.items()}
    return [
        f"## {datetime.now(UTC):%Y-%m-%d}: {title}",
        "",
        ", ".join(f"{name} {value}" for name, value in shown.items()),
        "",
        f"`{' '.join(['python', 'benchmarks/' + Path(sys.argv[0]).name, *sys.argv[1:]])}`",
        "",
    ]


def publish(lines: Sequence[str], *, write: bool) -> None:
    """On stdout, and, if asked, at the end of RESULTS.md."""
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    if write:
        before = (
            RESULTS.read_text("utf-8") if RESULTS.exists() else "# Results\n\nAdded to by the scripts here.\n"
        )
        RESULTS.write_text(f"{before.rstrip()}\n\n{text}", "utf-8")
