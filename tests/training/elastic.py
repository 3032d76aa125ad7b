"""A regression that any number of processes share; one of them dies in the middle. Run as a script, by torchrun or not.

Arguments: the run's folder, how the model is shared, and the step before which rank 1 dies, the first time.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_cli.training.config import LoopConfig, OptimizerConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.session import Session, session

TOTAL = 6
"""Numbers in a batch."""


@dataclass(frozen=True)
class Configuration:
    """As much of one as a session asks for."""

    loop: LoopConfig


class Shared:
    """Five numbers to one, dealt out."""

    def __init__(self, here: Session) -> None:
        torch.manual_seed(3)
        self.module, self.share = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), here.share

    def step(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        data = torch.randn(TOTAL, 5, generator=generator)[self.share.mine(index)]
        errors = (self.module(data)[:, 0] - data.sum(1)).square()
        return errors.sum() * self.share.hands / TOTAL, {"images": float(len(data))}

    def describe(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        return {"ids": []}


class Dying(Run):
    """Rank 1 is killed."""

    at = -1

    def advance(self, index: int) -> dict[str, float]:
        if index == self.at and self.world.rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().advance(index)


def main(folder: Path, kind: str, at: int) -> None:
    torch.set_num_threads(1)
    optimizer = OptimizerConfig(learning_rate=1e-2)
    loop = LoopConfig(
        max_steps=8,
        batch_size=TOTAL // int(os.environ.get("WORLD_SIZE", "1")),
        save_every=3,
        log_every=2,
        ema_decay=0.9,
        device="cpu",
        distributed=kind,  # type: ignore[arg-type]
        optimizer=optimizer,
    )
    with session(folder, Configuration(loop), resume=False) as here:
        Dying.at = at
        run = Dying(Shared(here), loop, folder, {}, session=here)
        if here.state:
            run.resume()
        run.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
