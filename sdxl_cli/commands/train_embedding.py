"""``sdxl train-embedding``: teach a model a new word (textual inversion)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands import generate
from sdxl_cli.commands._options import Config, Json, Quiet, Set
from sdxl_cli.commands._training import (
    Accumulate,
    BatchSize,
    CacheFolder,
    Data,
    Device,
    Distributed,
    DryRun,
    Dtype,
    EmaDecay,
    EmaDevice,
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
    SampleEvery,
    SamplePrompts,
    SaveEvery,
    SaveModelEvery,
    Seed,
    ValidateEvery,
    ValidationData,
    WarmupSteps,
    loop_keys,
)
from sdxl_cli.commands._working import aliases, read_prompts

PANEL = "Train"
NAMED_KEYS = {
    "word": "embedding.word",
    "vectors": "embedding.vectors",
    "initial_word": "embedding.initial",
    "captions": "embedding.captions",
    "sample_every": "sample_every",
    "validate_every": "validate_every",
    "save_model_every": "save_model_every",
}
"""Parameters -> keys of the configuration."""


def command(
    data: Data = None,
    word: Annotated[
        str | None,
        typer.Option(
            "--word", "--token-string", "--placeholder-token", help="What the word is called.", metavar="NAME"
        ),
    ] = None,
    vectors: Annotated[
        int | None,
        typer.Option(
            "--vectors", "--num-vectors", help="Tokens that the word takes in a prompt.", metavar="N"
        ),
    ] = None,
    initial_word: Annotated[
        str | None,
        typer.Option(
            "--initial-word",
            "--init-word",
            "--initializer-token",
            help="Words of nearly that meaning, where it begins; without them it begins at random.",
            metavar="TEXT",
        ),
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(
            help="What is said of every picture: sentences about an object or a style, or own: its caption, with "
            "the word in it.",
            metavar="NAME",
        ),
    ] = None,
    output: Output = Path("runs/embedding"),
    preset: PresetName = "embedding",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model whose word it will be; it stays as it is.", metavar="FILE"),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option("--vae", help="Another autoencoder.", metavar="FILE", show_default="the model's"),
    ] = None,
    cache: CacheFolder = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    sample_prompts: SamplePrompts = None,
    sample_every: SampleEvery = None,
    validation: ValidationData = None,
    validate_every: ValidateEvery = None,
    save_model_every: SaveModelEvery = None,
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
    distributed: Distributed = None,
    save_every: SaveEvery = None,
    log_every: LogEvery = None,
    log_to: LogTo = None,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Teach a model a new word from a few pictures; the model stays as it is.

    The result is a small file: sdxl generate "a picture of NAME" --embedding runs/embedding/NAME.safetensors
    """
    given = dict(locals())

    from sdxl_cli import presets
    from sdxl_cli.errors import UsageError
    from sdxl_cli.generation.request import GenerateRequest
    from sdxl_cli.training.config import UNetTrainConfig
    from sdxl_cli.training.unet_request import UNetRequest
    from sdxl_cli.training.unet_run import train_unet, try_unet

    console = consoles.configure(quiet=quiet, json=as_json)
    flags = loop_keys(given) | {key: given[name] for name, key in NAMED_KEYS.items()}
    resolved = presets.layered(UNetTrainConfig, preset=preset, config=config, sets=sets or (), flags=flags)
    if not resolved.embedding.word:
        raise UsageError("a word is needed, by which prompts will mention what is learned; give --word NAME")
    request = UNetRequest(
        data=data,
        output=output,
        config=resolved,
        init=model,
        vae=vae,
        cache=cache,
        resume=resume,
        validation=validation,
        sample_lines=tuple(read_prompts(sample_prompts, aliases(generate.command, GenerateRequest))),
    )
    if dry_run:
        measured = try_unet(request)
        console.print_result(str(measured))
        console.json(measured)
        return
    result = train_unet(request)
    console.note(f"{result.steps} steps, loss {result.loss:.4f}")
    console.print_result(str(result.path))
    console.json(result)
