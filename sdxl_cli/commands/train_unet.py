"""``sdxl train-unet``: train the U-Net of a base or a refiner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Config, Json, Quiet, Set

PANEL = "Train"


def command(
    data: Annotated[
        Path,
        typer.Option(
            "--data", "-d", help="Manifest that bucket-dataset wrote.", metavar="FILE", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for the result, the state and the metrics.", metavar="DIR"
        ),
    ] = Path("runs/unet"),
    preset: Annotated[
        str, typer.Option("--preset", help="A shipped preset or a TOML file.", metavar="NAME")
    ] = "unet-tiny",
    init: Annotated[
        str | None, typer.Option("--init", "--model", "-m", help="Model to start from.", metavar="FILE")
    ] = None,
    vae: Annotated[
        str | None, typer.Option("--vae", help="Autoencoder that encodes the pictures.", metavar="FILE")
    ] = None,
    text_from: Annotated[
        str | None,
        typer.Option("--text-from", help="Model whose text encoders are used, frozen.", metavar="FILE"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", help="Folder of encoded pictures.", metavar="DIR", show_default="in --output"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", "--max-train-steps", help="Steps in all.", metavar="N")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--train-batch-size", help="Pictures per step.", metavar="N")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate of AdamW.", metavar="X")
    ] = None,
    noise_offset: Annotated[
        float | None, typer.Option("--noise-offset", help="Offset noise; the paper has 0.05.", metavar="X")
    ] = None,
    min_snr_gamma: Annotated[
        float | None, typer.Option("--min-snr-gamma", help="Min-SNR weighting; 0 is off.", metavar="X")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Decides data order and noise.", metavar="N")
    ] = None,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a U-Net on the pictures of a manifest.

    Ctrl-C finishes the step and saves; the same command with --resume goes on where it stopped.
    """
    from sdxl_cli import presets
    from sdxl_cli.training.config import UNetTrainConfig
    from sdxl_cli.training.unet_run import UNetRequest, train_unet

    console = consoles.configure(quiet=quiet, json=as_json)
    flags = {
        "loop.max_steps": max_steps,
        "loop.batch_size": batch_size,
        "loop.optimizer.learning_rate": learning_rate,
        "loop.seed": seed,
        "noise_offset": noise_offset,
        "min_snr_gamma": min_snr_gamma,
    }
    resolved = presets.layered(UNetTrainConfig, preset=preset, config=config, sets=sets or (), flags=flags)
    request = UNetRequest(
        data=data,
        output=output,
        config=resolved,
        init=init,
        vae=vae,
        text_from=text_from,
        cache=cache,
        resume=resume,
    )
    result = train_unet(request)
    console.note(f"{result.steps} steps, loss {result.loss:.4f}")
    console.print_result(str(result.path))
    console.json(result)
