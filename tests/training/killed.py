"""A small run that is killed at its n-th touch of the disk, for every n; then gone on with. Run as a script.

Arguments: a folder. Says as JSON at how many places it was killed, and what was different from an undisturbed run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_cli.checkpoint import stream
from sdxl_cli.training.config import LoopConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.state import load_state, states

CONFIG = LoopConfig(max_steps=3, save_every=2, keep_states=1, log_every=3, ema_decay=0.9, device="cpu")
TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class Regression:
    """Five numbers to one."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.module = nn.Linear(5, 1)

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        data = torch.randn(8, 5, generator=generator)
        return (self.module(data)[:, 0] - data.sum(1)).square().mean(), {"images": 8.0}

    def describe(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        return {"ids": []}


def train(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    run = Run(Regression(), CONFIG, folder, {})
    if states(folder):
        run.resume()
    run.train()


def kill_at(number: int, folder: Path) -> None:
    """Let this process die at its ``number``-th touch of the folder."""
    left = number

    def touched() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            touched()
            self.file.write(data[len(data) // 2 :])

    write_all = stream._write_all
    stream._write_all = lambda file, tensors: write_all(Counting(file), tensors)  # type: ignore[arg-type]
    os.fsync = lambda descriptor: touched()  # a kill does not lose what the system has taken
    sys.addaudithook(
        lambda event, args: touched() if event in TOUCHES and str(args[0]).startswith(str(folder)) else None
    )


def forked(work: Callable[[], None]) -> int:
    """What became of it in a process of its own: 0, or minus the signal that ended it."""
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root: Path) -> None:
    torch.set_num_threads(1)
    train(root / "whole")  # here, so that those who are forked find everything imported
    expected, values = load_state(root / "whole")
    lines = log(root / "whole")
    different: list[int] = []
    number = 0
    while True:
        folder = root / f"killed-{number}"

        def disturbed(folder: Path = folder, number: int = number) -> None:
            kill_at(number, folder)
            train(folder)

        ended = forked(disturbed)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
        train(folder)
        found, others = load_state(folder)
        same = found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
        if not same or others != values or log(folder) != lines:
            different.append(number)
        if list((folder / "state").glob(".*")):
            different.append(-number)
        number += 1
    print(json.dumps({"kills": number, "different": different}))


def log(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without how fast it was."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
