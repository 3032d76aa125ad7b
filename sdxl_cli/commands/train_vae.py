"""``sdxl train-vae``: train the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Config, Json, Quiet, Set
from sdxl_cli.commands._training import (
    WATCH,
    Accumulate,
    BatchSize,
    Device,
    Distributed,
    DryRun,
    Dtype,
    EmaDecay,
    EmaDevice,
    FusedBackward,
    LearningRate,
    LogEvery,
    LogTo,
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
OBJECTIVE = "What is learnt"
OWN_KEYS = {
    "decoder_only": "decoder_only",
    "perceptual": "loss.perceptual",
    "perceptual_scale": "loss.perceptual_weight",
    "kl_scale": "loss.kl",
    "disc_scale": "adversarial.weight",
    "disc_factor": "adversarial.factor",
    "disc_start": "adversarial.start",
    "disc_loss": "adversarial.loss",
    "validate_every": "validate_every",
    "sample_every": "sample_every",
    "save_model_every": "save_model_every",
}
"""This command's parameters -> keys of its configuration."""


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
    decoder_only: Annotated[
        bool | None,
        typer.Option(
            "--decoder-only", help="Leave the encoder as it is, and with it the latents.", metavar=""
        ),
    ] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    perceptual: Annotated[
        str | None,
        typer.Option(
            "--perceptual", help="LPIPS on vgg, or none.", metavar="NAME", rich_help_panel=OBJECTIVE
        ),
    ] = None,
    perceptual_weights: Annotated[
        list[Path] | None,
        typer.Option(
            "--perceptual-weights",
            "--lpips-weights",
            help="File of LPIPS or of its VGG16, where torch's cache lacks it; may be repeated.",
            metavar="FILE",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    perceptual_scale: Annotated[
        float | None,
        typer.Option("--perceptual-scale", help="Weight of LPIPS.", metavar="X", rich_help_panel=OBJECTIVE),
    ] = None,
    kl_scale: Annotated[
        float | None,
        typer.Option(
            "--kl-scale", help="Weight of the KL divergence.", metavar="X", rich_help_panel=OBJECTIVE
        ),
    ] = None,
    disc_scale: Annotated[
        float | None,
        typer.Option(
            "--disc-scale",
            help="Weight of the adversarial loss; 0 trains without a discriminator.",
            metavar="X",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    disc_factor: Annotated[
        float | None,
        typer.Option(
            "--disc-factor",
            help="Times both networks' adversarial losses.",
            metavar="X",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    disc_start: Annotated[
        int | None,
        typer.Option(
            "--disc-start",
            help="First step with the discriminator.",
            metavar="N",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    disc_loss: Annotated[
        str | None,
        typer.Option("--disc-loss", help="hinge or vanilla.", metavar="NAME", rich_help_panel=OBJECTIVE),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation",
            help="Manifest of held-out pictures, whose reconstructions are measured and drawn.",
            metavar="FILE",
            rich_help_panel=WATCH,
        ),
    ] = None,
    validate_every: Annotated[
        int | None,
        typer.Option(
            "--validate-every", help="Steps between measurements.", metavar="N", rich_help_panel=WATCH
        ),
    ] = None,
    sample_every: Annotated[
        int | None,
        typer.Option(
            "--sample-every",
            help="Steps between drawn reconstructions.",
            metavar="N",
            rich_help_panel=WATCH,
        ),
    ] = None,
    save_model_every: Annotated[
        int | None,
        typer.Option(
            "--save-model-every",
            "--save-every-n-steps",
            help="Steps between autoencoder files that are kept.",
            metavar="N",
            rich_help_panel=WATCH,
        ),
    ] = None,
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
    fused_backward: FusedBackward = None,
    dtype: Dtype = None,
    distributed: Distributed = None,
    save_every: SaveEvery = None,
    log_every: LogEvery = None,
    log_to: LogTo = None,
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
    from sdxl_cli.training.vae_config import VAETrainConfig
    from sdxl_cli.training.vae_run import VAERequest, train_vae, try_vae

    console = consoles.configure(quiet=quiet, json=as_json)
    flags = loop_keys(given) | {key: given[name] for name, key in OWN_KEYS.items()}
    resolved = presets.layered(VAETrainConfig, preset=preset, config=config, sets=sets or (), flags=flags)
    request = VAERequest(
        data=tuple(data),
        output=output,
        config=resolved,
        init=init,
        resume=resume,
        validation=validation,
        perceptual_weights=tuple(perceptual_weights or ()),
    )
    if dry_run:
        measured = try_vae(request)
        console.print_result(str(measured))
        console.json(measured)
        return
    result = train_vae(request)
    console.note(f"{result.steps} steps, loss {result.loss:.4f}")
    console.print_result(str(result.path))
    console.json(result)
