"""``sdxl train-vae``: train the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Config, Json, Quiet, Set
from sdxl_cli.commands._training import (
    Accumulate,
    BatchSize,
    Device,
    DryRun,
    Dtype,
    EmaDecay,
    EmaDevice,
    LearningRate,
    LogEvery,
    LrScheduler,
    MaxGradNorm,
    MaxSteps,
    OptimizerChoice,
    Output,
    PresetName,
    Resume,
    SaveEvery,
    Seed,
    WarmupSteps,
    loop_keys,
)

PANEL = "Train"


def command(
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            "-d",
            help="Manifest that bucket-dataset wrote; may be repeated.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    output: Output = Path("runs/vae"),
    preset: PresetName = "vae-tiny",
    init: Annotated[
        str | None,
        typer.Option(
            "--init", help="Autoencoder to start from; one with fewer levels is grown.", metavar="FILE"
        ),
    ] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    optimizer: OptimizerChoice = None,
    learning_rate: LearningRate = None,
    lr_scheduler: LrScheduler = None,
    warmup_steps: WarmupSteps = None,
    max_grad_norm: MaxGradNorm = None,
    ema_decay: EmaDecay = None,
    ema_device: EmaDevice = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    save_every: SaveEvery = None,
    log_every: LogEvery = None,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train an autoencoder on the pictures of a manifest.

    Ctrl-C finishes the step and saves; the same command with --resume goes on where it stopped.
    """
    given = dict(locals())

    from sdxl_cli import presets
    from sdxl_cli.training.config import VAETrainConfig
    from sdxl_cli.training.vae_run import VAERequest, train_vae, try_vae

    console = consoles.configure(quiet=quiet, json=as_json)
    resolved = presets.layered(
        VAETrainConfig, preset=preset, config=config, sets=sets or (), flags=loop_keys(given)
    )
    request = VAERequest(data=tuple(data), output=output, config=resolved, init=init, resume=resume)
    if dry_run:
        measured = try_vae(request)
        console.print_result(str(measured))
        console.json(measured)
        return
    result = train_vae(request)
    console.note(f"{result.steps} steps, loss {result.loss:.4f}; latent std {result.latent_std}")
    console.print_result(str(result.path))
    console.json(result)
