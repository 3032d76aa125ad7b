"""Runs in several processes, without the seconds that each would take to import torch. Run as a script.

Arguments: a file with a JSON list of jobs ``[processes, function, arguments]``, done one after the other. Says
as JSON what became of each: exit codes by rank, and what was said on stderr.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdxl_cli import cli
from sdxl_cli.generation.batchfile import Line
from sdxl_cli.model.config import CONFIGS, ModelConfig
from sdxl_cli.training.config import OptimizerConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from sdxl_cli.training.unet_task import UNetTask
from sdxl_cli.training.vae_run import VAERequest, train_vae

small = runpy.run_path(str(Path(__file__).with_name("small.py")))
SMALL: ModelConfig = small["SMALL"]
UNET = replace(SMALL.unet, model_channels=8, num_head_channels=4, transformer_depth=(0, 1, 0), context_dim=40)
CONFIGS["small"] = replace(SMALL, unet=UNET)
# gradients that are all rounding do not become whole steps
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, eps=1e-3, weight_decay=0.1)
PATIENCE = 900
"""Seconds that a job may take."""


def unet(
    data: str, vae: str, cache: str, output: str, resume: bool = False, watched: bool = False, **changes: Any
) -> None:
    """Train the U-Net and its text encoders."""
    config = small["unet_config"](device="cpu", optimizer=OPTIMIZER, **changes)
    paths = {"data": Path(data), "vae": vae, "cache": Path(cache), "output": Path(output)}
    looks: dict[str, Any] = {}
    if watched:
        config = replace(config, validate_every=2, validate_levels=2, save_model_every=2, sample_every=2)
        picture = {"prompt": "a red disc", "steps": 2, "width": 64, "height": 64}
        looks = {"validation": Path(data), "sample_lines": (Line("here", picture),)}
    train_unet(UNetRequest(config=config, resume=resume, **looks, **paths))


def vae(data: str, output: str, resume: bool = False, **changes: Any) -> None:
    """Train the autoencoder."""
    config = small["vae_config"](device="cpu", optimizer=OPTIMIZER, **changes)
    train_vae(VAERequest(data=(Path(data),), output=Path(output), config=config, resume=resume))


def signalled(at: int, rank: int, **arguments: Any) -> None:
    """One process is asked to stop before step ``at``."""
    advance = Run.advance

    def step(self: Run, index: int) -> dict[str, float]:
        if index == at and self.world.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, index)

    Run.advance = step  # type: ignore[method-assign]
    unet(**arguments)


def spoiled(at: int, rank: int, where: str, **arguments: Any) -> None:
    """One process has a loss, or a gradient, that is not finite, in batch ``at``."""
    original = UNetTask.step

    def step(self: UNetTask, index: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        loss, metrics = original(self, index, generator)
        if index != at or int(os.environ.get("RANK", "0")) != rank:
            return loss, metrics
        return (loss * float("nan") if where == "loss" else loss + (loss - loss.detach()).sqrt()), metrics

    UNetTask.step = step  # type: ignore[method-assign]
    unet(**arguments)


def job(processes: int, name: str, arguments: dict[str, Any], said: Path) -> list[int]:
    """Do it in processes of their own; their exit codes by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        descriptor = os.open(said, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(descriptor, 2)
        os.dup2(descriptor, 1)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
            os.environ |= {
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        signal.alarm(PATIENCE)
        os._exit(done(name, arguments))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def done(name: str, arguments: dict[str, Any]) -> int:
    """What the program would exit with."""
    try:
        globals()[name](**arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except Exception as error:
        told = cli._told(error)
        if told is None:
            import traceback

            traceback.print_exc()
            return 99
        print(f"sdxl: {told}", file=sys.stderr, flush=True)
        return told.exit_code
    return 0


def main(jobs: Path) -> None:
    torch.set_num_threads(1)
    asked = json.loads(jobs.read_text())
    said = jobs.with_suffix(".said")
    found = []
    warm = Path(f"{jobs}.warm")  # those who are forked find everything imported
    unet(**asked[0][2] | {"output": str(warm), "max_steps": 1, "watched": False})
    for processes, name, arguments in asked:
        said.write_text("")
        found.append([job(processes, name, arguments, said), said.read_text()])
    jobs.with_suffix(".done").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
