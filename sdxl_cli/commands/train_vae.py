"""``sdxl train-vae``: train the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Config, Json, Quiet, Set

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
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for the result, the state and the metrics.", metavar="DIR"
        ),
    ] = Path("runs/vae"),
    preset: Annotated[
        str, typer.Option("--preset", help="A shipped preset or a TOML file.", metavar="NAME")
    ] = "vae-tiny",
    init: Annotated[
        str | None,
        typer.Option(
            "--init", help="Autoencoder to start from; one with fewer levels is grown.", metavar="FILE"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Steps in all.", metavar="N")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--train-batch-size", help="Pictures per step.", metavar="N")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate of AdamW.", metavar="X")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Decides data order and noise.", metavar="N")
    ] = None,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train an autoencoder on the pictures of a manifest.

    Ctrl-C finishes the step and saves; the same command with --resume goes on where it stopped.
    """
    from sdxl_cli import presets
    from sdxl_cli.training.config import VAETrainConfig
    from sdxl_cli.training.vae_run import VAERequest, train_vae

    console = consoles.configure(quiet=quiet, json=as_json)
    flags = {
        "loop.max_steps": max_steps,
        "loop.batch_size": batch_size,
        "loop.optimizer.learning_rate": learning_rate,
        "loop.seed": seed,
    }
    resolved = presets.layered(VAETrainConfig, preset=preset, config=config, sets=sets or (), flags=flags)
    result = train_vae(VAERequest(data=tuple(data), output=output, config=resolved, init=init, resume=resume))
    console.note(f"{result.steps} steps, loss {result.loss:.4f}; latent std {result.latent_std}")
    console.print_result(str(result.path))
    console.json(result)
