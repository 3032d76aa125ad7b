"""A run as torchrun starts it. Run as a script: the name of a function below, and a JSON object of its arguments."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdxl_cli import cli
from sdxl_cli.model.config import CONFIGS, ModelConfig
from sdxl_cli.training.config import OptimizerConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from sdxl_cli.training.vae_run import VAERequest, train_vae

small = runpy.run_path(str(Path(__file__).with_name("small.py")))
SMALL: ModelConfig = small["SMALL"]
UNET = replace(SMALL.unet, model_channels=8, num_head_channels=4, transformer_depth=(0, 1, 0), context_dim=40)
CONFIGS["small"] = replace(SMALL, unet=UNET)
# gradients that are all rounding do not become whole steps
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, eps=1e-5, weight_decay=0.1)


def unet(data: str, vae: str, cache: str, output: str, resume: bool = False, **changes: Any) -> None:
    """Train the U-Net and its text encoders."""
    config = small["unet_config"](device="cpu", optimizer=OPTIMIZER, **changes)
    paths = {"data": Path(data), "vae": vae, "cache": Path(cache), "output": Path(output)}
    train_unet(UNetRequest(config=config, resume=resume, **paths))


def vae(data: str, output: str, resume: bool = False, **changes: Any) -> None:
    """Train the autoencoder."""
    config = small["vae_config"](device="cpu", optimizer=OPTIMIZER, **changes)
    train_vae(VAERequest(data=(Path(data),), output=Path(output), config=config, resume=resume))


def several(runs: list[tuple[str, dict[str, Any]]]) -> None:
    """One after the other: to import torch takes longer than to train."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    for name, arguments in runs:
        globals()[name](**arguments)


def die(at: int, rank: int, number: int, **arguments: Any) -> None:
    """One process gets a signal before step ``at``, the first time."""
    advance = Run.advance

    def step(self: Run, index: int) -> dict[str, float]:
        first = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0
        if index == at and self.world.rank == rank and first:
            os.kill(os.getpid(), number)
        return advance(self, index)

    Run.advance = step  # type: ignore[method-assign]
    unet(**arguments)


def spoiled(at: int, rank: int, **arguments: Any) -> None:
    """One process has a loss that is not finite."""
    from sdxl_cli.training import unet_task

    original = unet_task.UNetTask.step

    def step(self: Any, index: int, generator: torch.Generator) -> Any:
        loss, metrics = original(self, index, generator)
        here = int(os.environ.get("RANK", "0")) == rank and index == at
        return (loss * float("nan") if here else loss), metrics

    unet_task.UNetTask.step = step  # type: ignore[method-assign]
    unet(**arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    try:
        globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    except Exception as error:
        told = cli._told(error)
        if told is None:
            raise
        print(f"sdxl: {told}", file=sys.stderr, flush=True)
        sys.exit(told.exit_code)
