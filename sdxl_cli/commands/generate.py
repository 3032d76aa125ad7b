"""``sdxl generate``: text to picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli import console as consoles
from sdxl_cli import presets
from sdxl_cli.commands import _canvas as canvas
from sdxl_cli.commands import _sampling as flags
from sdxl_cli.commands import _working as working
from sdxl_cli.commands._options import Config, Json, Preset, Quiet, Set
from sdxl_cli.commands._recall import again
from sdxl_cli.errors import UsageError

if TYPE_CHECKING:
    from sdxl_cli.checkpoint.files import ModelFiles
    from sdxl_cli.console import Console
    from sdxl_cli.generation.metadata import Stored
    from sdxl_cli.generation.request import GenerateRequest

PANEL = "Generate"
MODEL = flags.MODEL


def command(
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.", show_default=False)] = None,
    negative_prompt: flags.NegativePrompt = None,
    size: Annotated[
        str | None, typer.Option(help="Such as 1216x832, or a ratio such as 16:9.", metavar="WxH")
    ] = None,
    width: Annotated[
        int | None, typer.Option("--width", "-W", help="Wins over --size.", metavar="PIXELS")
    ] = None,
    height: Annotated[
        int | None, typer.Option("--height", "-H", help="Wins over --size.", metavar="PIXELS")
    ] = None,
    steps: flags.Steps = None,
    cfg_scale: flags.CfgScale = None,
    sampler: flags.Sampler = None,
    scheduler: flags.Scheduler = None,
    seed: flags.Seed = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", help="Pictures; seeds count up.", metavar="N")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures at once on a GPU; a CPU makes them one by one.", metavar="N")
    ] = None,
    prompt_2: flags.PromptTwo = None,
    prompt_syntax: flags.PromptSyntax = None,
    emphasis: flags.Emphasis = None,
    clip_skip: flags.ClipSkip = None,
    strict_tokens: flags.StrictTokens = None,
    embedding: flags.Embedding = None,
    embeddings_dir: flags.EmbeddingsDir = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Make this picture again; other flags change it.", metavar="PICTURE"),
    ] = None,
    hires_scale: canvas.HiresScale = None,
    hires_steps: canvas.HiresSteps = None,
    hires_denoising_strength: canvas.HiresStrength = None,
    hires_upscaler: canvas.HiresUpscaler = None,
    init_img: canvas.InitImg = None,
    strength: canvas.Strength = None,
    exact_steps: canvas.ExactSteps = None,
    resize_mode: canvas.ResizeMode = None,
    background: canvas.Background = None,
    mask: canvas.Mask = None,
    invert_mask: canvas.InvertMask = None,
    mask_blur: canvas.MaskBlur = None,
    mask_content: canvas.MaskContent = None,
    only_masked: canvas.OnlyMasked = None,
    mask_padding: canvas.MaskPadding = None,
    outpaint: canvas.Outpaint = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            "--ckpt",
            help="Checkpoint file, diffusers folder or cached hub id; default: SDXL if it is in the local cache, "
            "else the bundled tiny model.",
            metavar="FILE",
            rich_help_panel=MODEL,
        ),
    ] = None,
    refiner: Annotated[
        str | None,
        typer.Option(
            help="Does the last steps: file, folder or bundled.", metavar="FILE", rich_help_panel=MODEL
        ),
    ] = None,
    refiner_switch_at: Annotated[
        float | None,
        typer.Option(
            "--refiner-switch-at",
            "--high-noise-frac",
            help="Share of the noise that the base removes.",
            metavar="X",
            rich_help_panel=MODEL,
        ),
    ] = None,
    refiner_mode: canvas.RefinerMode = None,
    refiner_strength: canvas.RefinerStrength = None,
    vae: flags.Vae = None,
    lora: flags.Lora = None,
    lora_dir: flags.LoraDir = None,
    negative_prompt_2: flags.NegativePromptTwo = None,
    empty_negative: flags.EmptyNegative = None,
    cfg_rescale: flags.CfgRescale = None,
    cfg_interval: flags.CfgInterval = None,
    cfg_schedule: flags.CfgSchedule = None,
    adm_scale: flags.AdmScale = None,
    prediction: flags.Prediction = None,
    zero_terminal_snr: flags.ZeroTerminalSnr = None,
    sigmas: flags.Sigmas = None,
    timesteps: flags.Timesteps = None,
    eta: flags.Eta = None,
    s_noise: flags.SNoise = None,
    s_churn: flags.SChurn = None,
    original_size: flags.OriginalSize = None,
    crop_top_left: flags.CropTopLeft = None,
    target_size: flags.TargetSize = None,
    aesthetic_score: flags.AestheticScore = None,
    negative_original_size: flags.NegativeOriginalSize = None,
    negative_crop_top_left: flags.NegativeCropTopLeft = None,
    negative_target_size: flags.NegativeTargetSize = None,
    negative_aesthetic_score: flags.NegativeAestheticScore = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    vae_dtype: flags.VaeDtype = None,
    vram: flags.Vram = None,
    vae_tiling: flags.VaeTiling = None,
    winograd: flags.Winograd = None,
    prepack: flags.Prepack = None,
    cuda_graphs: flags.CudaGraphs = None,
    compile: flags.Compile = None,
    output: flags.Output = None,
    overwrite: flags.Overwrite = False,
    no_metadata: flags.NoMetadata = False,
    prompts_file: working.PromptsFile = None,
    sweep: working.Sweep = None,
    grid: working.Grid = False,
    interactive: working.Interactive = False,
    preview: working.Preview = None,
    preview_path: working.PreviewPath = None,
    preview_interval: working.PreviewInterval = 1,
    plan_only: working.PlanOnly = False,
    timings: working.ShowTimings = False,
    preset: Preset = None,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Make pictures from a prompt."""
    given = dict(locals())
    console = consoles.configure(quiet=quiet, json=as_json)
    working.check(given)
    request, stored = _request(given)
    if not (interactive or plan_only or prompts_file or sweep):
        _read_ahead(request)

    from sdxl_cli.generation.behind import Behind
    from sdxl_cli.generation.fewstep import FewSteps
    from sdxl_cli.generation.jobs import Workshop, expand
    from sdxl_cli.generation.request import GenerateRequest
    from sdxl_cli.generation.session import warn_of_another_model, warn_of_other_loras
    from sdxl_cli.generation.sweep import parse_sweeps

    names = working.aliases(command, GenerateRequest)
    lines, axes = working.read_prompts(prompts_file, names), parse_sweeps(sweep or (), names)
    behind = Behind()
    onlooker = working.look_on(given, console, behind.check)
    few_steps = FewSteps(_stated(given), console)
    shop = Workshop(lambda asked: _locate(asked, console), _buckets, onlooker, few_steps)
    worker = working.Worker(given, console, onlooker, shop, behind)
    if interactive:
        return working.converse(worker, request, names)
    settled = shop.settle_all(expand(request, lines, axes))
    if stored is not None:
        warn_of_another_model(stored, settled[0].files[0], console)
        warn_of_other_loras(stored, settled[0].models, console)
    if plan_only:
        working.show_plans(settled, console)
    else:
        working.work_all(worker, settled, axes)
    return 0


def _request(given: dict[str, Any]) -> tuple[GenerateRequest, Stored | None]:
    """What is asked for: the flags over the preset, or over what a picture says of itself."""
    from sdxl_cli.generation.request import GenerateRequest

    asked = flags.flags_of(GenerateRequest, given)
    if given["from_"] is None:
        if asked["prompt"] is None and working.several(given):
            asked["prompt"] = ""
        if asked["prompt"] is None and not given["config"] and not given["sets"] and not given["preset"]:
            raise UsageError('what should the picture show? For example: sdxl generate "a red guitar"')
        return (
            presets.layered(
                GenerateRequest,
                preset=given["preset"] or "generate",
                config=given["config"],
                sets=given["sets"] or (),
                flags=asked,
            ),
            None,
        )
    if given["preset"] or given["config"]:
        raise UsageError("--from says everything already; change it with flags or --set instead of a preset")
    return again(given["from_"], given["sets"] or [], asked, consoles.get())


def _stated(given: dict[str, Any]) -> frozenset[str] | None:
    """The fields the user gave a value; None: all of them, as a picture that is made again does."""
    from sdxl_cli.generation.request import GenerateRequest

    if given["from_"] is not None:
        return None
    return presets.stated(
        GenerateRequest,
        preset=given["preset"],
        config=given["config"],
        sets=given["sets"] or (),
        flags=flags.flags_of(GenerateRequest, given),
    )


def _read_ahead(request: GenerateRequest) -> None:
    """Begin to read the files that the request needs, and tell wrong ones, before torch is imported."""
    from sdxl_cli.checkpoint.ahead import read_ahead
    from sdxl_cli.checkpoint.locate import locate

    files = [locate(request.model, "base")]
    if request.refiner is not None:
        files.append(locate(request.refiner, "refiner"))
    read_ahead(files)


def _locate(request: GenerateRequest, console: Console) -> list[ModelFiles]:
    """The files of the base and, when asked for, of the refiner."""
    from sdxl_cli.checkpoint.locate import locate
    from sdxl_cli.generation.fewstep import detect
    from sdxl_cli.generation.settling import settled

    base = locate(request.model, "base")
    if request.vae is not None:
        base = base.with_vae(locate(request.vae, "vae"))
    console.note(f"model: {base.describe()}")
    few = detect(base, request.lora)
    base = settled(
        base,
        console,
        prediction=request.prediction,
        usual=few.family.prediction if few else None,
        zero_terminal_snr=request.zero_terminal_snr,
    )
    if request.refiner is None:
        return [base]
    refiner = locate(request.refiner, "refiner")
    if refiner.config.vae.z_channels != base.config.vae.z_channels:
        raise UsageError(f"--refiner {request.refiner}: its latents are not those of {base.name}")
    console.note(f"refiner: {refiner.describe('--refiner')}")
    return [base, settled(refiner, console)]


def _buckets(native: int) -> list[tuple[int, int]]:
    """The (height, width) of all shipped buckets of about ``native`` squared pixels, for ``--size 16:9``."""
    from sdxl_cli.data.buckets import Grid
    from sdxl_cli.data.manifest import DatasetConfig

    tables = [presets.load(name, DatasetConfig).buckets.table().sizes for name in presets.names("buckets")]
    near = [size for table in tables for size in table if 0.8 < size[0] * size[1] / native**2 < 1.25]
    if any(height != width for height, width in near):
        return near
    return list(Grid(area=native**2, step=64, min_side=native // 2, max_side=native * 2).sizes())
