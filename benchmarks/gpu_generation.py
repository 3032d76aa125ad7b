"""Pictures on a GPU beside diffusers: the released size, bf16, random weights. A table, and JSON after every row.

python benchmarks/gpu_generation.py --json out.json [--minutes 7.5]
python benchmarks/gpu_generation.py --device cpu --model tiny --side 64 --steps 2,3 --rounds 1 --peers default

Rows: whole pictures of 30 and 50 steps with guidance, one and eight at once, a step of the U-Net for both, decoding.
Sides: ours; ours with the encoders released before the U-Net comes (``sdxl-med``); diffusers as it is by default, with
channels last and fused projections (``best``), and that compiled with max-autotune. Each in a process of its own, in
turns A B B A; ``first`` is a run before the rounds, of two steps, in which steps are recorded and code is compiled.
A part of the work is compared with diffusers in a finer precision; where ours is farther from it than 1.5 times the
nearest peer, the exit code is 1. Arithmetic is counted; its share is that of the rate of matrix products in the same
process.

Rows for which there is no time are left out, and that is said. Compiling comes last and is ended with the time. By
default rounds are more for the shorter rows, and the precision is bf16, on a CPU fp32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from child import Answer, Ended, OutOfTime
from harness import GIB, OURS, Contestant, flags, heading, publish, said, weights_of
from job import Job, Kind, relative
from rows import Rows, missing
from safetensors.torch import load_file

from sdxl_cli.bench.machine import machine
from sdxl_cli.bench.timing import Spread, ratio, spread

MED = f"{OURS}-med"
PEERS = ("default", "best", "compiled")
FEW = 2
"""Steps of a picture that is made to be ready for others."""
FARTHER = 1.5
"""How many times as far from what is right as the nearest peer ours may be."""
AS_NOTHING = 2e-5
"""A difference that is rounding in fp32, by whichever algorithm."""
FINER = {"fp32": "fp64", "bf16": "fp32", "fp16": "fp32"}
FOR_COMPILING = 150.0
"""Seconds that rows of many pictures leave to it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A piece of work, in as many numbers of steps as are asked for where it is a picture."""

    kind: Kind
    many: bool
    """Several pictures at once."""
    rounds: int
    compiled: bool = False


ROWS = (
    Row("image", False, 5),
    Row("unet", False, 20),
    Row("decode", False, 10),
    Row("unet", True, 6),
    Row("image", True, 1),
    Row("image", False, 5, compiled=True),
)
"""In this order: compiling last."""
Make = Callable[[str, Job], Any]


class Bench:
    """Sides that stay from row to row, and what was found so far."""

    def __init__(self, args: argparse.Namespace, job: Job, rows: Rows, make: Make = Contestant) -> None:
        self.args, self.job, self.rows, self.make = args, job, rows, make
        self.sides: dict[str, Any] = {}
        self.rates: dict[str, float] = {}
        self.medians: dict[tuple[Kind, int], float] = {}
        """Seconds of all sides together at one picture."""
        self.far: list[str] = []
        self.about: dict[str, Any] = {}

    def name(self, row: Row) -> str:
        """As in the tables."""
        return f"{row.kind}, batch {self.args.many if row.many else 1}" + (
            ", compiled" if row.compiled else ""
        )

    def names(self, row: Row) -> list[str]:
        """Who takes part in a row; says who cannot."""
        asked = [peer for peer in self.args.peers.split(",") if peer]
        peers = [peer for peer in asked if (peer == "compiled") == row.compiled]
        if not peers and (asked or row.compiled):  # rows of others are asked for
            return []
        if gone := peers and missing("diffusers"):
            self.rows.leave_out(f"{self.name(row)}, diffusers", gone)
            peers = []
        if row.compiled and not peers:
            return []
        med = [MED] if row.kind == "image" and not (row.many or row.compiled) else []
        return [OURS, *med, *(f"diffusers-{peer}" for peer in peers)]

    def run(self, wanted: Sequence[Row]) -> None:
        """All rows for which there is time."""
        with tempfile.TemporaryDirectory() as scratch:
            for row in wanted:
                names = self.names(row)
                if not names or not self.rows.allows(self.name(row), self.name(row), self._least(row)):
                    continue
                try:
                    self._row(row, names, Path(scratch))
                except (Ended, OutOfTime) as why:
                    self.rows.leave_out(self.name(row), str(why))
                    self._drop()
        self._drop()

    def _least(self, row: Row) -> float:
        """Seconds that a row of many pictures takes at least, reckoned from those of one."""
        if not row.many:
            return 0.0
        first = self.args.steps[0] if row.kind == "image" else 0
        return self._keeps(row) + self.args.many * self.medians.get((row.kind, first), 0.0)

    def _keeps(self, row: Row) -> float:
        """Seconds that rows of many pictures leave."""
        return FOR_COMPILING if row.many and "compiled" in self.args.peers else 0.0

    def _row(self, row: Row, names: list[str], scratch: Path) -> None:
        job = replace(self.job, kind=row.kind, batch=self.args.many if row.many else 1)
        judge = self._judged(job, names, scratch) if row.kind != "image" and not row.many else ""
        first = self._built(row, job, names)
        steps = self.args.steps if row.kind == "image" else (None,)
        flops = {name: self._counted(name, row) for name in first if name != MED}
        flops |= {name: flops[OURS] for name in first if name == MED}
        for number in steps:
            if number != steps[0] and not self._time_for(row, number):
                continue
            found: dict[str, list[Answer]] = {
                name: [] for name in first if name != MED or number == steps[0]
            }  # what it saves does not depend on the steps
            for turn in range(self.args.rounds or row.rounds):
                before = self.rows.left()
                for name in list(found)[:: -1 if turn % 2 else 1]:
                    found[name].append(self._ask(name, "run", steps=number, save=str(scratch / name)))
                if self.rows.left() < before - self.rows.left():
                    break
            right = judge or OURS
            errors = {name: _apart(scratch / name, scratch / right) for name in found if name != right}
            self._add(row, number, found, first, {n: of(number) for n, of in flops.items()}, errors, right)

    def _time_for(self, row: Row, steps: int) -> bool:
        """Whether a round of so many steps fits in, by what one of fewer took."""
        known = self.args.steps[0]
        batch = self.args.many if row.many else 1
        needed = self.medians.get((row.kind, known), 0.0) * batch * steps / known
        name = f"{self.name(row)}, {steps} steps"
        return self.rows.allows(name, name, self._keeps(row) + needed)

    def _judged(self, job: Job, names: Sequence[str], scratch: Path) -> str:
        """Diffusers in a finer precision, or ours without it, does the job once; what its result is called."""
        side = "diffusers" if any(name.startswith("diffusers") for name in names) else OURS
        finer = FINER[job.dtype]
        if side == OURS and finer == "fp64":  # ours has none
            return ""
        name = f"{side} in {finer}"
        judge = self.make(side, replace(job, dtype=finer))
        try:
            judge.ask("run", within=self.rows.left(), save=str(scratch / name))
            judge.close()
        except (Ended, OutOfTime) as why:
            self.rows.leave_out(f"{job.kind}, {name}", str(why))
            return ""
        return name

    def _built(self, row: Row, job: Job, names: Sequence[str]) -> dict[str, float]:
        """Have all load at the same time, then each do it once: its seconds. Who fails is left out, but for ours."""
        for name in [name for name in self.sides if name not in names]:
            self.sides.pop(name).close()
        stay = set(self.sides)
        for name in names:
            if name in stay:
                self.sides[name].order("build", job=job.to_text())
            else:
                self.sides[name] = self.make(name, job)
        first = {}
        few = FEW if row.kind == "image" else None
        for name in names:
            side = self.sides[name]
            try:
                if name in stay:
                    side.answer(self.rows.left())
                else:
                    self.about |= side.ready(self.rows.left())["machine"]
                    self.rates[name] = self._ask(name, "ceiling", dtype=job.dtype)["rate"]
                first[name] = self._ask(name, "run", steps=few)["seconds"]
            except (Ended, OutOfTime) as why:
                if name == OURS:
                    raise
                self.rows.leave_out(f"{self.name(row)}, {name}", str(why))
                self._drop(name)
        return first

    def _counted(self, name: str, row: Row) -> Callable[[int | None], int]:
        """Operations by steps: what comes before and after them, and so many times a step."""
        if row.kind != "image":
            found = self._ask(name, "count")["flops"]
            return lambda steps: found
        few, more = (self._ask(name, "count", steps=number)["flops"] for number in (FEW, FEW + 1))
        return lambda steps: few + ((steps or FEW) - FEW) * (more - few)

    def _ask(self, name: str, do: str, **more: Any) -> Answer:
        return self.sides[name].ask(
            do, within=self.rows.left(), **{k: v for k, v in more.items() if v is not None}
        )

    def _drop(self, *names: str) -> None:
        """End these sides, or all; one that is in the middle of something is not waited for."""
        for name in names or list(self.sides):
            self.sides.pop(name).kill()

    def _add(
        self, row: Row, steps: int | None, found: dict[str, list[Answer]], first: dict[str, float],
        flops: dict[str, int], errors: dict[str, float], right: str,
    ) -> None:  # fmt: skip
        seconds = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
        batch = self.args.many if row.many else 1
        self.medians[row.kind, steps or 0] = sum(spread(s).median for s in seconds.values()) / batch
        for name, runs in found.items():
            took = spread(seconds[name])
            line = {
                "row": self.name(row), "kind": row.kind, "batch": batch, "steps": steps, "side": name,
                "seconds": took.median, "low": took.low, "high": took.high, "rounds": took.count,
                "seconds_per_picture": took.median / batch, "first_s": first[name],
                "allocated_gib": max(run["memory"]["most"] for run in runs) / GIB,
                "reserved_gib": max(run["memory"]["reserved"] for run in runs) / GIB,
                "tflop": flops[name] / 1e12, "of_matrix_rate": flops[name] / took.median / self.rates[name],
                "matrix_tflops": self.rates[name] / 1e12, "difference": errors.get(name), "from": right,
            }  # fmt: skip
            if name != OURS:
                line["ours_faster"] = asdict(ratio(seconds[OURS], seconds[name]))
            self.rows.add(line, _said(line))
        theirs = [error for name, error in errors.items() if name.startswith("diffusers")]
        if right != OURS and theirs and not errors[OURS] <= max(FARTHER * min(theirs), AS_NOTHING):
            self.far.append(
                f"{self.name(row)}: ours {errors[OURS]:.1e} from {right}, theirs {min(theirs):.1e}"
            )


def _apart(found: Path, right: Path) -> float:
    return relative(*(load_file(path)["out"] for path in (found, right)))


def _said(line: dict[str, Any]) -> str:
    steps = f", {line['steps']} steps" if line["steps"] else ""
    took = f"{line['seconds']:.4g} s ({line['rounds']}), first {line['first_s']:.3g} s"
    return f"{line['row']}{steps}: {line['side']} {took}"


COLUMNS = (
    "side", "first s", "seconds", "from … to", "a picture", "ours is faster by", "TFLOP", "of peak", "GiB", "reserved",
    "difference",
)  # fmt: skip


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: a table for each piece of work."""
    lines: list[str] = []
    before = None
    for row in rows:
        if (row["row"], row["steps"]) != before:
            before = row["row"], row["steps"]
            steps = f", {row['steps']} steps with guidance" if row["steps"] else ""
            lines += ["", f"**{row['row']}**{steps}; difference is relative, from {row['from']}", ""]
            lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        faster, apart = row.get("ours_faster"), row["difference"]
        cells = [
            row["side"], f"{row['first_s']:.3g}", f"{row['seconds']:.4g} ({row['rounds']})",
            f"{row['low']:.4g} … {row['high']:.4g}", f"{row['seconds_per_picture']:.4g}",
            said(Spread(**faster)) if faster else "", f"{row['tflop']:.4g}", f"{row['of_matrix_rate']:.0%}",
            f"{row['allocated_gib']:.2f}", f"{row['reserved_gib']:.2f}" if row["reserved_gib"] else "",
            "" if apart is None else f"{apart:.1e}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    about = {
        "command": ["benchmarks/gpu_generation.py", *sys.argv[1:]], "machine": machine(device, ("diffusers",)),
        "model": args.model, "side": args.side, "dtype": args.dtype,
    }  # fmt: skip
    rows = Rows(args.minutes, args.json, about)
    folder = weights_of(args)
    job = Job(
        folder=str(folder), kind="image", height=args.side, width=args.side, steps=args.steps[0], dtype=args.dtype,
        device=args.device, threads=args.threads,
    )  # fmt: skip
    bench = Bench(args, job, rows)
    bench.run([row for row in ROWS if row.kind in args.only])
    if not rows.rows:
        sys.exit("no row was measured; why is above")
    rate = max(row["matrix_tflops"] for row in rows.rows)
    lines = heading(bench.about, f"pictures on a GPU, {args.model} size, random weights")
    lines.append(
        f"{args.side}x{args.side}, {args.dtype}; peak is {rate:.3g} TFLOP/s of plain matrix products"
    )
    lines += [*tables(rows.rows), ""]
    lines += [f"- left out: {one['row']}: {one['why']}" for one in rows.left_out]
    publish(lines, write=args.write)
    if bench.far:
        sys.exit(f"farther from what is right than {FARTHER} times the peer: {'; '.join(bench.far)}")


def arguments() -> argparse.Namespace:
    parser = flags(__doc__, rounds=0)
    parser.set_defaults(model="base", dtype="", device="cuda")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--steps", default="30,50", help="of whole pictures; rows for each")
    parser.add_argument("--many", type=int, default=8, help="pictures at once in the rows of several")
    parser.add_argument("--only", default="image,unet,decode", help="of these kinds of rows")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--minutes", type=float, default=7.5, help="rows that do not fit in are left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; give --device cpu --model tiny for a trial of the script")
    for flag, all_of in (("only", ("image", "unet", "decode")), ("peers", PEERS)):
        if wrong := set(getattr(args, flag).split(",")) - {*all_of, ""}:
            sys.exit(f"--{flag} {', '.join(sorted(wrong))}: there are {', '.join(all_of)}")
    try:
        args.steps = tuple(int(number) for number in args.steps.split(","))
    except ValueError:
        sys.exit(f"--steps {args.steps}: expected numbers with commas between, such as 30,50")
    args.only = args.only.split(",")
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    return args


if __name__ == "__main__":
    main()
