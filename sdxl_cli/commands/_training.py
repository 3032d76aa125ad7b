"""The flags that all training commands share, and the keys of the configuration they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

STEP, MACHINE, WATCH = "Optimization", "Where it runs", "Saving and watching"

Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Folder for the result, the state and the metrics.", metavar="DIR"),
]
PresetName = Annotated[str, typer.Option("--preset", help="A shipped preset or a TOML file.", metavar="NAME")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Train on the largest size once, say memory, rate and time to the end, and write nothing.",
    ),
]
MaxSteps = Annotated[
    int | None,
    typer.Option("--max-steps", "--max-train-steps", help="Steps in all.", metavar="N", rich_help_panel=STEP),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "--train-batch-size",
        help="Pictures that go through the network together.",
        metavar="N",
        rich_help_panel=STEP,
    ),
]
Accumulate = Annotated[
    int | None,
    typer.Option(
        "--accumulate",
        "--gradient-accumulation-steps",
        help="Batches that make up a step; every picture counts alike.",
        metavar="N",
        rich_help_panel=STEP,
    ),
]
OptimizerChoice = Annotated[
    str | None,
    typer.Option(
        "--optimizer", help="adamw, adamw8bit, adafactor or prodigy.", metavar="NAME", rich_help_panel=STEP
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option("--learning-rate", help="Highest learning rate.", metavar="X", rich_help_panel=STEP),
]
LrScheduler = Annotated[
    str | None,
    typer.Option(
        "--lr-scheduler",
        help="constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.",
        metavar="NAME",
        rich_help_panel=STEP,
    ),
]
WarmupSteps = Annotated[
    int | None,
    typer.Option(
        "--warmup-steps",
        "--lr-warmup-steps",
        help="Steps in which the rate rises from 0.",
        metavar="N",
        rich_help_panel=STEP,
    ),
]
MaxGradNorm = Annotated[
    float | None,
    typer.Option(
        "--max-grad-norm",
        help="Longer gradients are scaled down; 0 is off.",
        metavar="X",
        rich_help_panel=STEP,
    ),
]
EmaDecay = Annotated[
    float | None,
    typer.Option("--ema-decay", help="Of the averaged weights; 0 is off.", metavar="X", rich_help_panel=STEP),
]
EmaDevice = Annotated[
    str | None,
    typer.Option(
        "--ema-device", help="Where the average is kept: same or cpu.", metavar="NAME", rich_help_panel=STEP
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Decides data order and noise.", metavar="N", rich_help_panel=STEP),
]
FusedBackward = Annotated[
    bool | None,
    typer.Option(
        "--fused-backward",
        help="Change each weight inside the backward pass; no gradients are stored.",
        metavar="",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.", metavar="NAME", rich_help_panel=MACHINE),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        "--mixed-precision",
        help="What networks compute in: auto, fp32 or bf16; sums are fp32 in any case.",
        metavar="NAME",
        rich_help_panel=MACHINE,
    ),
]
Distributed = Annotated[
    str | None,
    typer.Option(
        "--distributed",
        help="How processes started by torchrun share the work: auto, ddp, fsdp, hsdp or off.",
        metavar="NAME",
        rich_help_panel=MACHINE,
    ),
]
LogTo = Annotated[
    list[str] | None,
    typer.Option(
        "--log-to",
        "--report-to",
        help="Send metrics to tensorboard or wandb, too; may be repeated.",
        metavar="NAME",
        rich_help_panel=WATCH,
    ),
]
SaveEvery = Annotated[
    int | None,
    typer.Option("--save-every", help="Steps between saved states.", metavar="N", rich_help_panel=WATCH),
]
LogEvery = Annotated[
    int | None,
    typer.Option(
        "--log-every", help="Steps between lines of metrics.jsonl.", metavar="N", rich_help_panel=WATCH
    ),
]
SamplePrompts = Annotated[
    Path | None,
    typer.Option(
        "--sample-prompts",
        help="Prompts of pictures to make during training, one a line as for generate --prompts-file.",
        metavar="FILE",
        rich_help_panel=WATCH,
    ),
]
SampleEvery = Annotated[
    int | None,
    typer.Option(
        "--sample-every",
        "--sample-every-n-steps",
        help="Steps between them.",
        metavar="N",
        rich_help_panel=WATCH,
    ),
]
ValidationData = Annotated[
    Path | None,
    typer.Option(
        "--validation",
        help="Manifest of held-out pictures, whose loss is measured on fixed noise.",
        metavar="FILE",
        rich_help_panel=WATCH,
    ),
]
ValidateEvery = Annotated[
    int | None,
    typer.Option("--validate-every", help="Steps between measurements.", metavar="N", rich_help_panel=WATCH),
]
SaveModelEvery = Annotated[
    int | None,
    typer.Option(
        "--save-model-every",
        "--save-every-n-steps",
        help="Steps between model files that are kept.",
        metavar="N",
        rich_help_panel=WATCH,
    ),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder of encoded pictures.", metavar="DIR", show_default="in --output"),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", "-d", help="Manifest that bucket-dataset wrote.", metavar="FILE"),
]


LOOP_KEYS = {
    "max_steps": "loop.max_steps",
    "batch_size": "loop.batch_size",
    "accumulate": "loop.accumulate",
    "optimizer": "loop.optimizer.name",
    "learning_rate": "loop.optimizer.learning_rate",
    "lr_scheduler": "loop.optimizer.schedule",
    "warmup_steps": "loop.optimizer.warmup_steps",
    "max_grad_norm": "loop.optimizer.max_grad_norm",
    "ema_decay": "loop.ema_decay",
    "ema_device": "loop.ema_device",
    "seed": "loop.seed",
    "device": "loop.device",
    "dtype": "loop.dtype",
    "distributed": "loop.distributed",
    "log_to": "loop.log_to",
    "fused_backward": "loop.fused_backward",
    "save_every": "loop.save_every",
    "log_every": "loop.log_every",
}
"""Parameters of a command -> keys of its configuration."""


def loop_keys(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the shared flags say, by the configuration's keys; None where one was not given, or the command lacks it.

    Args:
        given: parameters of the command, by name.
    """
    keys = {key: given.get(name) for name, key in LOOP_KEYS.items()}
    keys["loop.log_to"] = tuple(given["log_to"]) if given["log_to"] else None
    if given["accumulate"] is not None:
        keys["loop.total_batch_size"] = 0  # the preset's; a number of batches says it otherwise
    return keys
