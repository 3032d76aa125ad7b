"""Training the U-Net on a GPU, beside diffusers: the released size, 1024², bf16 over fp32 weights, random numbers.

python benchmarks/gpu_training.py --json out.json [--minutes 7]
python benchmarks/gpu_training.py --device cpu --model tiny --size 128 --most 4     a trial, a minute on a small machine

A step is that of ``train_sides.py``: ours is the loop of ``sdxl train-unet``, theirs train_text_to_image_sdxl.py with a
fused AdamW. First steps of one picture with every way of saving memory, the comparable ones of both sides in turns,
A B B A; then the largest batch that fits, found by doubling and by steps between, whose steps are timed. Memory is the
most that torch had allocated and reserved in a step, each side in a process of its own; arithmetic is counted at one
picture; its share is that of the rate of matrix products in the same process. Losses of one picture are compared with
those of the first row, step by step.

Every row is printed and written at once. Rows for which there is no time are left out, and that is said. The exit code
is 1 when losses do not agree.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from child import Answer, Child, Ended, OutOfTime, serve
from harness import heading, publish, said
from rows import Rows, missing
from train_sides import Data, Place, Trainee, Way, build, random_weights

from sdxl_cli.bench.ceiling import gemm_rate
from sdxl_cli.bench.counting import count
from sdxl_cli.bench.machine import machine
from sdxl_cli.bench.memory import peak_memory
from sdxl_cli.bench.timing import Spread, ratio, spread, timed
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.device import DTYPES
from sdxl_cli.generation.residency import ran_out_of_memory
from sdxl_cli.model.config import CONFIGS

RATE = 1e-5
WARM, TIMED = 2, 3
"""Steps before those that count, and how many count at the largest batch."""
HALVINGS = 3
"""How finely the largest batch is looked for between one that fits and one that does not."""
AGREE = {"fp32": 2e-3, "bf16": 2e-2}
"""Relative difference of losses that rounding makes in the few steps of a run, and a mistake does not."""
GIB = 1 << 30
ALLOCATOR = "expandable_segments:True"
"""Of both sides: what was freed is used again for other sizes, as batches grow."""


@dataclass(frozen=True, slots=True)
class Row:
    """Ways that are timed together, of one picture or at the largest batch."""

    kind: Literal["one", "largest"]
    ways: tuple[Way, ...]

    def __str__(self) -> str:
        what = "one picture" if self.kind == "one" else "largest batch"
        return f"{what}: " + " and ".join(f"{way.side}, {way}" for way in self.ways)


THEIRS, CHECKPOINTED = Way(side="diffusers"), Way(side="diffusers", memory="blocks")
SMALLEST = Way(memory="all", optimizer="adafactor", weights="bf16", fused_backward=True)
ROWS = (
    Row("one", (Way(), THEIRS)),
    Row("one", (Way(memory="blocks"), CHECKPOINTED)),
    Row("one", (Way(memory="ff"),)),
    Row("one", (Way(memory="all"),)),
    Row("one", (SMALLEST,)),
    Row("largest", (Way(),)),
    Row("largest", (THEIRS,)),
    Row("largest", (Way(memory="blocks"),)),
    Row("largest", (CHECKPOINTED,)),
    Row("one", (Way(fused_backward=True),)),
    Row("one", (Way(optimizer="adafactor"),)),
    Row("one", (Way(weights="bf16"),)),
    Row("one", (Way(memory="all", weights="bf16", fused_backward=True),)),
    Row("one", (Way(memory="all", optimizer="adamw8bit", weights="bf16", fused_backward=True),)),
    Row("largest", (Way(memory="ff"),)),
    Row("largest", (Way(side="diffusers", channels_last=True),)),
    Row("largest", (Way(memory="all"),)),
)  # fmt: skip
"""In the order of what they are worth, should time run out."""


class Workshop:
    """One side in its process: what its orders do."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.config = args, CONFIGS[args.model]
        self.place = Place(device=torch.device(args.device), computes=args.dtype, rate=RATE)
        self.trainee: Trainee | None = None

    def obey(self, order: Answer) -> Answer:
        """Do it; when memory is not enough, let go and say so."""
        found: Answer | None = None
        try:
            found = getattr(self, order.pop("do"))(**order)
        except UsageError as error:
            return {"refused": str(error)}
        except Exception as error:
            # it holds what was computed, which goes with it
            if not ran_out_of_memory(error):
                raise
        if found is None:
            if self.trainee:
                self.trainee.forget()
            self._sweep()
            return {"full": True}
        return found

    def build(self, way: dict[str, Any], batch: int) -> Answer:
        """Make a side anew, with data of so many pictures."""
        self.free()
        weights = random_weights(self.config, self.place.device)
        self.trainee = build(self.config, weights, Way(**way), self.place, self._data(batch))
        return {}

    def data(self, batch: int) -> Answer:
        """Give the side that is there data of so many pictures."""
        assert self.trainee
        self._sweep()
        self.trainee.set(self._data(batch))
        return {}

    def step(self, index: int) -> Answer:
        """Train one step, and say what it took."""
        trainee, losses = self.trainee, list[float]()
        assert trainee
        trainee.prepare(index)
        with peak_memory(self.place.device) as memory:
            sample = timed(lambda: losses.append(trainee.step(index)), self.place.device)
        allocated = memory.most if self.place.device.type == "cuda" else memory.own
        return {
            "seconds": sample.seconds, "loss": losses[0], "allocated": allocated, "reserved": memory.reserved,
        }  # fmt: skip

    def count(self, index: int) -> Answer:
        """Train a step and count its arithmetic, what is computed twice counting twice."""
        trainee = self.trainee
        assert trainee
        trainee.prepare(index)
        return {"flops": count(lambda: trainee.step(index)).flops}

    def ceiling(self) -> Answer:
        """The rate of matrix products here."""
        return {"rate": gemm_rate(DTYPES[self.args.dtype], self.place.device)}

    def free(self) -> Answer:
        """Let go of everything."""
        self.trainee = None
        self._sweep()
        return {}

    def _data(self, batch: int) -> Data:
        return Data(self.config, self.args.size, batch)

    def _sweep(self) -> None:
        gc.collect()
        if self.place.device.type == "cuda":
            torch.cuda.empty_cache()


class Full(Exception):
    """Memory is not enough."""


class Refused(Exception):
    """A side does not do that here; why."""


class Side:
    """A process that lives as long as it answers."""

    def __init__(self, name: str, command: Sequence[str], rows: Rows) -> None:
        self.name, self.command, self.rows = name, command, rows
        self.rate = 0.0
        self._child: Child | None = None

    def ask(self, do: str, **more: Any) -> Answer:
        """As :meth:`Child.ask`, until the time of the run is over.

        Raises:
            Full, Refused: see there.
            Ended, OutOfTime: the next order is for a new process.
        """
        if self._child is None:
            self._child = Child(
                self.name, [*self.command, "--serve", self.name], {"PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR}
            )
            self.rate = self.ask("ceiling")["rate"]
        try:
            found = self._child.ask(do, within=self.rows.left(), **more)
        except (Ended, OutOfTime):
            self._child = None
            raise
        if "refused" in found:
            raise Refused(found["refused"])
        if "full" in found:
            raise Full
        return found

    def build(self, way: Way, batch: int) -> None:
        """See :meth:`Workshop.build`."""
        self.ask("build", way=asdict(way), batch=batch)

    def free(self) -> None:
        """See :meth:`Workshop.free`."""
        if self._child:
            self.ask("free")

    def close(self) -> None:
        """End the process."""
        if self._child:
            self._child.close()
            self._child = None


class Bench:
    """Both sides, and what was found so far."""

    def __init__(self, args: argparse.Namespace, rows: Rows, sides: dict[str, Any]) -> None:
        self.args, self.rows, self.sides = args, rows, sides
        self.flops: dict[Way, int] = {}
        """Of a step of one picture."""
        self.losses: list[float] = []
        """Of the first row, step by step: what the others are compared with."""
        self.disagree: list[str] = []

    def run(self, wanted: Sequence[Row]) -> None:
        """All rows for which there is time."""
        gone = missing("diffusers")
        for row in wanted:
            ways = [way for way in row.ways if not (gone and way.side == "diffusers")]
            if len(ways) < len(row.ways):
                self.rows.leave_out(str(Row(row.kind, (row.ways[-1],))), gone)
            if not ways or not self.rows.allows(str(row), row.kind):
                continue
            began = self.rows.left()
            try:
                (self._one if row.kind == "one" else self._largest)(ways)
            except Full:
                self.rows.leave_out(str(row), "memory is not enough")
            except (Refused, Ended, OutOfTime) as why:
                self.rows.leave_out(str(row), str(why))
            self.rows.took(row.kind, began - self.rows.left())
        for side in self.sides.values():
            side.close()

    def _one(self, ways: Sequence[Way]) -> None:
        """One picture: both sides in memory where they fit, else one after the other."""
        found: dict[Way, list[Answer]]
        try:
            found = self._in_turns(ways)
        except Full:
            if len(ways) == 1:
                raise
            found = {}
            for way in ways:
                found |= self._in_turns([way])
        for way in ways:
            self._add(way, 1, found[way], ours=found[ways[0]])

    def _in_turns(self, ways: Sequence[Way]) -> dict[Way, list[Answer]]:
        for side in self.sides.values():
            side.free()
        for way in ways:
            self.sides[way.side].build(way, 1)
        found: dict[Way, list[Answer]] = {way: [] for way in ways}
        for index in range(WARM + self.args.rounds):
            for way in ways[:: -1 if index % 2 else 1]:
                found[way].append(self.sides[way.side].ask("step", index=index))
        for way in ways:
            self.flops[way] = self.sides[way.side].ask("count", index=WARM + self.args.rounds)["flops"]
        return found

    def _largest(self, ways: Sequence[Way]) -> None:
        """The largest batch; each that was tried is a row, as it may be the fastest."""
        (way,) = ways
        for side in self.sides.values():
            side.free()
        side = self.sides[way.side]
        side.build(way, 1)
        if way not in self.flops:
            self.flops[way] = side.ask("count", index=0)["flops"]
        allowed = self.rows.left() / 2
        began, tried = self.rows.left(), dict[int, list[Answer]]()

        def fits(batch: int) -> bool:
            side.ask("data", batch=batch)
            try:
                tried[batch] = [side.ask("step", index=index) for index in range(2)]
            except Full:
                return False
            return True

        best = largest(fits, self.args.most, lambda: began - self.rows.left() < allowed)
        if not best:
            raise Full
        fastest = min(tried, key=lambda batch: tried[batch][-1]["seconds"] / batch)
        for batch in sorted({fastest, best}):
            side.ask("data", batch=batch)
            steps = [side.ask("step", index=index) for index in range(WARM + TIMED)]
            self._add(way, batch, steps, largest=best)

    def _add(
        self, way: Way, batch: int, steps: list[Answer], ours: list[Answer] | None = None, largest: int = 0
    ) -> None:
        seconds = [step["seconds"] for step in steps[WARM:]]
        of_it, side = spread(seconds), self.sides[way.side]
        flops = self.flops[way] * batch
        row = {
            "side": way.side, "way": str(way), "batch": batch,
            "images_per_s": batch / of_it.median, "ms": 1e3 * of_it.median, "ms_low": 1e3 * of_it.low,
            "ms_high": 1e3 * of_it.high, "steps": of_it.count, "first_s": steps[0]["seconds"],
            "allocated_gib": max(step["allocated"] for step in steps) / GIB,
            "reserved_gib": max(step["reserved"] for step in steps) / GIB,
            "tflop": flops / 1e12, "of_matrix_rate": flops / of_it.median / side.rate,
            "matrix_tflops": side.rate / 1e12,
        }  # fmt: skip
        if largest:
            row |= {"largest": largest, "all_fit": largest == self.args.most}
        else:
            row |= self._compared(way, [step["loss"] for step in steps])
        if ours and ours is not steps:
            row |= {"ours_faster": asdict(ratio([step["seconds"] for step in ours[WARM:]], seconds))}
        self.rows.add(row)

    def _compared(self, way: Way, losses: list[float]) -> dict[str, float]:
        """The largest relative difference from the first row's losses at the same steps."""
        self.losses = self.losses or losses
        apart = max(abs(a / b - 1) for a, b in zip(losses, self.losses, strict=True))
        # weights in bf16, and updates of another kind, are other work
        same = way.weights == "fp32" and way.optimizer == "adamw" and not way.fused_backward
        if same and not apart <= AGREE[self.args.dtype]:  # not a number is no agreement
            self.disagree.append(f"{way.side}, {way}: {apart:.1e}")
        return {"loss": losses[0], "losses_apart": apart}


def largest(fits: Callable[[int], bool], most: int, go_on: Callable[[], bool]) -> int:
    """The largest batch up to ``most`` that fits, as far as it was looked for; 0 when not even one picture does.

    Args:
        fits: tries a batch.
        most: is tried when half of it fits.
        go_on: whether there is time to try another.
    """
    best, batch = 0, 1
    while batch <= most and (not best or go_on()):
        if not fits(batch):
            break
        best, batch = batch, max(batch + 1, min(2 * batch, most)) if batch < most else most + 1
    least = max(1, best >> HALVINGS)
    above = batch
    while above <= most and above - best > least and go_on():
        middle = (best + above) // 2
        if fits(middle):
            best = middle
        else:
            above = middle
    return best


COLUMNS = (
    "side", "way", "batch", "images/s", "ms a step", "from … to", "first s", "GiB", "reserved", "TFLOP", "of peak",
    "losses apart", "ours is faster by",
)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        batch = f"{row['batch']}"
        if row["batch"] == row.get("largest"):
            batch += " (the most that was tried)" if row["all_fit"] else " (largest)"
        apart, faster = row.get("losses_apart"), row.get("ours_faster")
        cells = [
            row["side"], row["way"], batch, f"{row['images_per_s']:.2f}", f"{row['ms']:.4g} ({row['steps']})",
            f"{row['ms_low']:.4g} … {row['ms_high']:.4g}", f"{row['first_s']:.3g}", f"{row['allocated_gib']:.2f}",
            f"{row['reserved_gib']:.2f}" if row["reserved_gib"] else "", f"{row['tflop']:.4g}",
            f"{row['of_matrix_rate']:.0%}", "" if apart is None else f"{apart:.1e}",
            said(Spread(**faster)) if faster else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def best_of(rows: list[dict[str, Any]]) -> str:
    """The fastest of each side that fits the device."""
    best = {}
    for row in rows:
        if row["side"] not in best or row["images_per_s"] > best[row["side"]]["images_per_s"]:
            best[row["side"]] = row
    texts = [
        f"{side} {row['images_per_s']:.2f} images/s ({row['way']}, batch {row['batch']})"
        for side, row in best.items()
    ]
    if len(best) == 2:
        texts.append(f"{best['sdxl']['images_per_s'] / best['diffusers']['images_per_s']:.2f} times as many")
    return "the fastest that fits: " + "; ".join(texts)


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    if args.serve:
        serve(Workshop(args).obey)
        return
    device = torch.device(args.device)
    about = {
        "command": ["benchmarks/gpu_training.py", *sys.argv[1:]],
        "machine": machine(device, ("diffusers", "bitsandbytes")),
        "model": args.model, "size": args.size, "dtype": args.dtype, "allocator": ALLOCATOR,
    }  # fmt: skip
    rows = Rows(args.minutes, args.json, about)
    options = [
        "--model", args.model, "--size", str(args.size), "--dtype", args.dtype, "--device", args.device,
    ]  # fmt: skip
    sides = {name: Side(name, [__file__, *options], rows) for name in ("sdxl", "diffusers")}
    bench = Bench(args, rows, sides)
    wanted = [row for row in ROWS if args.rows in ("all", row.kind)]
    bench.run(wanted)
    if not rows.rows:
        sys.exit("no row was measured; why is above")
    lines = heading(about["machine"], f"training on a GPU, {args.model} size, random weights")
    pixels = f"{args.size}x{args.size}, {args.dtype} over fp32 weights unless said, {ALLOCATOR}"
    rate = statistics.median(row["matrix_tflops"] for row in rows.rows)
    lines += [f"{pixels}; peak is {rate:.3g} TFLOP/s of plain matrix products", "", *table(rows.rows), ""]
    lines += [best_of(rows.rows), ""]
    lines += [f"- left out: {one['row']}: {one['why']}" for one in rows.left_out]
    publish(lines, write=args.write)
    if bench.disagree:
        sys.exit(f"losses do not agree: {'; '.join(bench.disagree)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("tiny", "base"), default="base")
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--dtype", choices=tuple(AGREE), help="bf16; on a CPU fp32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10, help="steps of one picture in turns")
    parser.add_argument("--most", type=int, default=128, help="the largest batch that is tried")
    parser.add_argument("--rows", choices=("all", "one", "largest"), default="all")
    parser.add_argument("--minutes", type=float, default=7.0, help="rows that do not fit in are left out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="add the table to RESULTS.md")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; give --device cpu --model tiny for a trial of the script")
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    return args


if __name__ == "__main__":
    main()
