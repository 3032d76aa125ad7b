"""``sdxl refine``: a finished picture, gone over again by the refiner."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli import console as consoles
from sdxl_cli import presets
from sdxl_cli.commands import _sampling as flags
from sdxl_cli.commands._options import Config, Json, Preset, Quiet, Set
from sdxl_cli.errors import UsageError

if TYPE_CHECKING:
    from sdxl_cli.checkpoint.files import ModelFiles
    from sdxl_cli.console import Console
    from sdxl_cli.generation.picture import Target
    from sdxl_cli.generation.request import RefineRequest
    from sdxl_cli.generation.weights import FileWeights

PANEL = "Generate"
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
READING = ("prompt_syntax", "emphasis", "embedding", "embeddings_dir")
"""Without these the texts would mean something else than they did."""


def command(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures to refine.", show_default=False)],
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", "--denoising-strength", help="Share of the noise put back, 0 to 1.", metavar="X"
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Default: what the picture itself says it was made from.", metavar="TEXT"),
    ] = None,
    negative_prompt: flags.NegativePrompt = None,
    steps: flags.Steps = None,
    cfg_scale: flags.CfgScale = None,
    sampler: flags.Sampler = None,
    scheduler: flags.Scheduler = None,
    seed: flags.Seed = None,
    prompt_2: flags.PromptTwo = None,
    prompt_syntax: flags.PromptSyntax = None,
    emphasis: flags.Emphasis = None,
    clip_skip: flags.ClipSkip = None,
    strict_tokens: flags.StrictTokens = None,
    embedding: flags.Embedding = None,
    embeddings_dir: flags.EmbeddingsDir = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--refiner",
            "-m",
            help="Checkpoint file, diffusers folder or cached hub id; default: the SDXL refiner if it is in the "
            "local cache, else the bundled one.",
            metavar="FILE",
            rich_help_panel=flags.MODEL,
        ),
    ] = None,
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
    preset: Preset = None,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Add some noise to pictures and let the refiner take it away again."""
    given = dict(locals())
    console = consoles.configure(quiet=quiet, json=as_json)

    from sdxl_cli.checkpoint.ahead import read_ahead
    from sdxl_cli.generation.request import require_prompts_fit

    requests = [_request(picture, given) for picture in pictures]
    for request in requests:
        require_prompts_fit(request)
    files = _locate(requests[0], console)
    read_ahead([files])
    places = _places(pictures, output, overwrite)

    from sdxl_cli.generation.behind import Behind, finishing
    from sdxl_cli.generation.session import open_weights

    weights = open_weights([files], requests[0], console)[0]
    started, behind = time.perf_counter(), Behind()
    made: list[dict[str, object]] = []
    with finishing(behind, console.warn):
        for picture, request, place in zip(pictures, requests, places, strict=True):
            behind.do(_refined(picture, request, weights, place, console, made, keep_record=not no_metadata))
    console.json({"pictures": made, "seconds": round(time.perf_counter() - started, 3)})


def _request(picture: Path, given: dict[str, Any]) -> RefineRequest:
    """What is asked for; the prompts come from the picture when no flag has them, and how they are read too."""
    from sdxl_cli.generation.metadata import read_record
    from sdxl_cli.generation.request import RefineRequest

    stored = read_record(picture)
    asked = flags.flags_of(RefineRequest, given)
    if asked["prompt"] is None and stored is not None:
        for name in (*TEXTS, *READING):
            asked[name] = asked[name] if asked[name] is not None else getattr(stored.request, name)
    if asked["prompt"] is None:
        raise UsageError(f"{picture}: does not say what it shows; give --prompt")
    return presets.layered(
        RefineRequest,
        preset=given["preset"] or "refine",
        config=given["config"],
        sets=given["sets"] or (),
        flags=asked,
    )


def _locate(request: RefineRequest, console: Console) -> ModelFiles:
    """The files of the model; by default a refiner, but a base is as welcome."""
    from sdxl_cli.checkpoint.locate import locate
    from sdxl_cli.generation.settling import settled

    files = locate(request.model, "refiner" if request.model in (None, "bundled") else "model")
    if request.vae is not None:
        files = files.with_vae(locate(request.vae, "vae"))
    console.note(f"model: {files.describe()}")
    return settled(files, console, prediction=request.prediction, zero_terminal_snr=request.zero_terminal_snr)


def _places(pictures: list[Path], output: str | None, overwrite: bool) -> list[Target]:
    from sdxl_cli.generation.picture import target

    return [
        target(output, prefix=f"{picture.stem}-refined", count=len(pictures), overwrite=overwrite)
        for picture in pictures
    ]


def _refined(
    picture: Path,
    request: RefineRequest,
    weights: FileWeights,
    place: Target,
    console: Console,
    made: list[dict[str, object]],
    *,
    keep_record: bool,
) -> Callable[[], None]:
    """Refine one picture; returns what writes the result and says so, also to ``made``."""
    from sdxl_cli.generation.picture import Texts, read_pixels
    from sdxl_cli.generation.pipeline import Models, record, refine
    from sdxl_cli.generation.plan import plan_refinement, size_multiple
    from sdxl_cli.generation.session import fit_to_model, source_record

    pixels = fit_to_model(read_pixels(picture), size_multiple(weights.config), picture.name, console)
    plan = plan_refinement(request, (pixels.shape[0], pixels.shape[1]), weights.formulation)
    console.note(f"{picture.name}: {plan.steps} of {request.steps} steps: {plan.split()}")
    result = refine(plan, pixels, weights, console)

    def save() -> None:
        texts = Texts()
        if keep_record:
            source = source_record(picture)
            texts = record(plan, Models(base=weights), result.seed, kind="refine", source=source).texts()
        path = place.save(result.pixels, result.seed, texts)
        console.print_result(str(path))
        made.append({"path": path, "seed": result.seed, "steps": plan.steps, "request": plan.request})

    return save
