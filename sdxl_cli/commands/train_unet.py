"""``sdxl train-unet``: train the U-Net of a base or a refiner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands import generate
from sdxl_cli.commands._options import Config, Json, Quiet, Set
from sdxl_cli.commands._training import (
    MACHINE,
    STEP,
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
OBJECTIVE, LORA = "Objective", "LoRA"
OWN_KEYS = (
    "prediction",
    "zero_terminal_snr",
    "noise_offset",
    "min_snr_gamma",
    "timestep_min",
    "timestep_max",
    "memory",
    "weight_dtype",
    "text_dropout",
    "allow_missing_captions",
    "sample_every",
    "validate_every",
    "save_model_every",
    "train_text_encoders",
)
"""Parameters that are keys of the configuration, too."""
NAMED_KEYS = {
    "rank": "lora.rank",
    "alpha": "lora.alpha",
    "dora": "lora.dora",
    "layout": "lora.layout",
    "unet_lr": "loop.optimizer.rates.unet",
    "clip_l_lr": "loop.optimizer.rates.clip_l",
    "big_g_lr": "loop.optimizer.rates.big_g",
}
"""Parameters -> keys of other names."""


def command(
    data: Data = None,
    output: Output = Path("runs/unet"),
    preset: PresetName = "unet-tiny",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model to start from, or that the LoRA is for.", metavar="FILE"),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init", "--network-weights", help="The same, or a LoRA to go on from.", metavar="FILE"
        ),
    ] = None,
    vae: Annotated[
        str | None, typer.Option("--vae", help="Autoencoder that encodes the pictures.", metavar="FILE")
    ] = None,
    text_from: Annotated[
        str | None,
        typer.Option("--text-from", help="Model whose text encoders are used, frozen.", metavar="FILE"),
    ] = None,
    cache: CacheFolder = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Count the memory of a step with each --memory, without weights or data, and stop."
        ),
    ] = False,
    sample_prompts: SamplePrompts = None,
    sample_every: SampleEvery = None,
    validation: ValidationData = None,
    validate_every: ValidateEvery = None,
    save_model_every: SaveModelEvery = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            "--network-dim",
            help="Of a LoRA's changes; 0 trains the weights themselves.",
            metavar="N",
            rich_help_panel=LORA,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha",
            "--network-alpha",
            help="Changes count alpha / rank; 0 takes the rank.",
            metavar="X",
            rich_help_panel=LORA,
        ),
    ] = None,
    dora: Annotated[
        bool | None,
        typer.Option("--dora/--no-dora", help="Train magnitudes apart, as DoRA does.", rich_help_panel=LORA),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Names in the file: kohya or diffusers.", metavar="NAME", rich_help_panel=LORA),
    ] = None,
    train_text_encoders: Annotated[
        bool | None,
        typer.Option(
            "--train-text-encoders/--freeze-text-encoders",
            help="Train the text encoders, or a LoRA of them, too.",
            rich_help_panel=STEP,
        ),
    ] = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    optimizer: OptimizerChoice = None,
    learning_rate: LearningRate = None,
    unet_lr: Annotated[
        float | None,
        typer.Option("--unet-lr", help="Of the U-Net alone; 0 leaves it.", metavar="X", rich_help_panel=STEP),
    ] = None,
    clip_l_lr: Annotated[
        float | None,
        typer.Option(
            "--clip-l-lr",
            "--learning-rate-te1",
            help="Of the first text encoder alone.",
            metavar="X",
            rich_help_panel=STEP,
        ),
    ] = None,
    big_g_lr: Annotated[
        float | None,
        typer.Option(
            "--big-g-lr",
            "--learning-rate-te2",
            help="Of the second text encoder alone.",
            metavar="X",
            rich_help_panel=STEP,
        ),
    ] = None,
    lr_scheduler: LrScheduler = None,
    warmup_steps: WarmupSteps = None,
    max_grad_norm: MaxGradNorm = None,
    ema_decay: EmaDecay = None,
    ema_device: EmaDevice = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    distributed: Distributed = None,
    fused_backward: FusedBackward = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            help="What is computed again instead of being kept: auto, none, ff (feed-forward networks), "
            "blocks (transformer blocks) or all.",
            metavar="NAME",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    weight_dtype: Annotated[
        str | None,
        typer.Option(
            "--weight-dtype",
            help="What weights are stored in: fp32 or bf16, which is rounded at random.",
            metavar="NAME",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    save_every: SaveEvery = None,
    log_every: LogEvery = None,
    log_to: LogTo = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            help="What the network predicts: eps, v or x0.", metavar="NAME", rich_help_panel=OBJECTIVE
        ),
    ] = None,
    zero_terminal_snr: Annotated[
        bool | None,
        typer.Option(
            "--zero-terminal-snr", help="Train down to pure noise.", metavar="", rich_help_panel=OBJECTIVE
        ),
    ] = None,
    noise_offset: Annotated[
        float | None,
        typer.Option(
            "--noise-offset",
            help="Offset noise; the paper has 0.05.",
            metavar="X",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    min_snr_gamma: Annotated[
        float | None,
        typer.Option(
            "--min-snr-gamma",
            "--snr-gamma",
            help="Min-SNR weighting; 0 is off.",
            metavar="X",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    timestep_min: Annotated[
        int | None,
        typer.Option(
            "--timestep-min",
            "--min-timestep",
            help="First noise level trained, from 0.",
            metavar="N",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    timestep_max: Annotated[
        int | None,
        typer.Option(
            "--timestep-max",
            "--max-timestep",
            help="Last noise level trained, up to 999.",
            metavar="N",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    text_dropout: Annotated[
        float | None,
        typer.Option(
            "--text-dropout",
            "--caption-dropout-rate",
            help="Chance of training without text.",
            metavar="X",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    allow_missing_captions: Annotated[
        bool | None,
        typer.Option(
            "--allow-missing-captions",
            help="Train on pictures without a caption, too.",
            metavar="",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a U-Net, or a LoRA, on the pictures of a manifest.

    Ctrl-C finishes the step and saves; the same command with --resume goes on where it stopped.
    """
    given = dict(locals())

    from sdxl_cli import presets
    from sdxl_cli.generation.request import GenerateRequest
    from sdxl_cli.training.config import UNetTrainConfig
    from sdxl_cli.training.plan import memory_table
    from sdxl_cli.training.unet_request import UNetRequest, starting_points
    from sdxl_cli.training.unet_run import plan_unet, train_unet, try_unet

    console = consoles.configure(quiet=quiet, json=as_json)
    flags = loop_keys(given) | {name: given[name] for name in OWN_KEYS}
    flags |= {key: given[name] for name, key in NAMED_KEYS.items()}
    resolved = presets.layered(UNetTrainConfig, preset=preset, config=config, sets=sets or (), flags=flags)
    start, lora = starting_points(model, init, resolved)
    request = UNetRequest(
        data=data,
        output=output,
        config=resolved,
        init=start,
        lora=lora,
        vae=vae,
        text_from=text_from,
        cache=cache,
        resume=resume,
        validation=validation,
        sample_lines=tuple(read_prompts(sample_prompts, aliases(generate.command, GenerateRequest))),
    )
    if plan:
        planned = plan_unet(request)
        console.table(
            *memory_table(planned),
            title=f"{planned.size}, batch {planned.batch_size}, GB of 10⁹ bytes",
        )
        console.json(planned)
        free = "nobody knows how much" if planned.free is None else f"{planned.free / 1e9:.1f} GB"
        console.note(f"{free} free on {planned.device}; --memory auto: {planned.auto or 'not even all fits'}")
        return
    if dry_run:
        measured = try_unet(request)
        console.print_result(str(measured))
        console.json(measured)
        return
    result = train_unet(request)
    console.note(f"{result.steps} steps, loss {result.loss:.4f}")
    console.print_result(str(result.path))
    console.json(result)
