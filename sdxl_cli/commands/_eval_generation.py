"""``sdxl eval generation``: a model's pictures measured while they are made; the paper's Figure 12 over scales."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli import console as consoles
from sdxl_cli import presets
from sdxl_cli.commands import _measuring as shared
from sdxl_cli.commands import _sampling as flags
from sdxl_cli.commands._options import Config, Json, Preset, Quiet, Set
from sdxl_cli.console import Console
from sdxl_cli.errors import UsageError

if TYPE_CHECKING:
    from sdxl_cli.evaluation.generation import Make
    from sdxl_cli.generation.request import GenerateRequest

METRICS = ("fid", "kid", "is", "clip")


def command(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="Text, a prompt a line; COCO's captions_val2017.json; a table with a column prompt or caption; or "
            "pictures with captions.",
            metavar="PROMPTS",
            show_default=False,
        ),
    ],
    reference: shared.Reference_ = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", help="Pictures to make.", metavar="N", min=1, show_default="one for every prompt"
        ),
    ] = None,
    cfg_scale: Annotated[
        str | None,
        typer.Option(
            "--cfg-scale",
            "--guidance-scale",
            help="Strength of the prompt; several with commas between make the curve of FID against CLIP score.",
            metavar="X,...",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="Some of fid, kid, is, clip.",
            metavar="NAMES",
            show_default="all; without --reference is,clip",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="As for sdxl generate.", metavar="FILE", rich_help_panel=flags.MODEL
        ),
    ] = None,
    refiner: Annotated[
        str | None,
        typer.Option(help="Does the last steps.", metavar="FILE", rich_help_panel=flags.MODEL),
    ] = None,
    vae: flags.Vae = None,
    lora: flags.Lora = None,
    negative_prompt: flags.NegativePrompt = None,
    steps: flags.Steps = None,
    sampler: flags.Sampler = None,
    scheduler: flags.Scheduler = None,
    picture_size: Annotated[
        str | None,
        typer.Option("--picture-size", help="Of the pictures made; WxH.", metavar="WxH"),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", "-s", help="First seed; they count up.", metavar="N", min=0)
    ] = 0,
    dtype: flags.Dtype = None,
    vae_dtype: flags.VaeDtype = None,
    vram: flags.Vram = None,
    no_pictures: Annotated[
        bool, typer.Option("--no-pictures", help="Keep the numbers alone, not the pictures.")
    ] = False,
    size: shared.Size = 256,
    filter_name: shared.Filter = "bicubic",
    batch_size: shared.BatchSize = 16,
    device: shared.Device = "auto",
    output: shared.Output = None,
    inception_weights: shared.InceptionWeights = None,
    resize: shared.Resize = "tf1",
    clip_model: shared.ClipModel = None,
    clip_weights: shared.ClipWeights = None,
    kid_subsets: shared.KidSubsets = 100,
    kid_subset_size: shared.KidSubsetSize = None,
    is_splits: shared.IsSplits = 10,
    metric_seed: shared.MetricSeed = 2020,
    preset: Preset = None,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make pictures and measure them: FID, KID, IS, CLIP score, over guidance scales (Table 2, Figure 12).

    Pictures, with their features, are saved as they are made: the same command goes on where it stopped.
    Every setting of sdxl generate that has no flag here can be given as --set NAME=VALUE.
    """
    given = dict(locals())
    console = consoles.configure(quiet=quiet, json=as_json)

    from sdxl_cli.evaluation.curve import draw, points
    from sdxl_cli.evaluation.distribution import scores_of
    from sdxl_cli.evaluation.generation import Samples, generated
    from sdxl_cli.evaluation.networks import Networks
    from sdxl_cli.evaluation.pictures import read_prompts
    from sdxl_cli.evaluation.scores import TABLE_2, Row, parse_metrics, write_results

    wanted = parse_metrics(metrics or ("fid,kid,is,clip" if reference else "is,clip"), METRICS)
    networks = Networks(
        shared.network_flags(given), inception=bool({"fid", "kid", "is"} & set(wanted)), clip="clip" in wanted
    )
    texts = read_prompts(prompts)
    chosen = Samples(prompts=texts, count=samples or len(texts), seed=seed)
    request = _request(given, chosen.prompt(0))
    make, models, settled = _maker(given, request, console)
    scales = _scales(cfg_scale) or [settled.cfg_scale]
    frame = shared.framing(size, filter_name)
    folder = shared.place(output, "generation", {**chosen.settings(), **networks.settings(), **given})
    console.note(f"{chosen.count} pictures for {len(texts)} prompts at {len(scales)} scales; into {folder}")
    other, warnings = shared.reference(given, wanted, frame, folder, console, count=chosen.count)
    rows = []
    for scale in scales:
        table = generated(
            chosen,
            replace(settled, cfg_scale=scale),
            models,
            make,
            networks,
            frame,
            folder / f"cfg-{scale:g}",
            batch=batch_size,
            keep=not no_pictures,
        )
        scores, said = scores_of(table, wanted, other, shared.drawing(given))
        rows.append(Row(name=f"cfg {scale:g}", scores=tuple(scores)))
        warnings += said
    settings = {
        **chosen.settings(),
        **networks.settings(),
        "reference": other.settings if other else None,
        "drawing": shared.drawing(given),
        **frame.settings(),
        "models": models,
        "request": settled,
    }
    content, path = write_results(
        folder, "eval generation", rows, settings=settings, warnings=warnings, paper=TABLE_2
    )
    shared.show(console, rows, warnings=warnings, paper=TABLE_2, path=path, content=content)
    if curve := points(rows):
        draw(path.with_suffix(".png"), *curve)
        console.print_result(str(path.with_suffix(".png")))


def _request(given: dict[str, Any], prompt: str) -> GenerateRequest:
    """What every picture is asked for as, but for its prompt and seed."""
    from sdxl_cli.generation.request import GenerateRequest

    return presets.layered(
        GenerateRequest,
        preset=given["preset"] or "generate",
        config=given["config"],
        sets=given["sets"] or (),
        flags=_asked(given) | {"prompt": prompt, "seed": given["seed"]},
    )


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    """The flags that are settings of sdxl generate."""
    names = ("model", "refiner", "vae", "lora", "negative_prompt", "steps", "sampler", "scheduler", "dtype")
    asked = {name: given[name] for name in (*names, "vae_dtype", "vram", "device")}
    # the others are put in its place one after the other
    first = next(iter(_scales(given["cfg_scale"])), None)
    return {**asked, "size": given["picture_size"], "cfg_scale": first}


def _scales(text: str | None) -> list[float]:
    """``1.5,3,5`` as numbers; none when it is not given."""
    try:
        scales = [float(part) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        raise UsageError(
            f"--cfg-scale {text}: expected numbers with commas between, such as 1.5,3,5"
        ) from error
    return list(dict.fromkeys(scales))


def _maker(
    given: dict[str, Any], request: GenerateRequest, console: Console
) -> tuple[Make, dict[str, str | None], GenerateRequest]:
    """What makes a picture, the models' hashes, and the request with what a few-step model changes about it."""
    from sdxl_cli.commands.generate import _buckets, _locate
    from sdxl_cli.generation.fewstep import FewSteps
    from sdxl_cli.generation.jobs import Job, Workshop
    from sdxl_cli.generation.picture import Pixels, Texts
    from sdxl_cli.generation.pipeline import generate, record
    from sdxl_cli.generation.request import GenerateRequest

    stated = presets.stated(
        GenerateRequest,
        preset=given["preset"],
        config=given["config"],
        sets=given["sets"] or (),
        flags=_asked(given),
    )
    report = _Quietly(console)
    shop = Workshop(lambda asked: _locate(asked, console), _buckets, report, FewSteps(stated, console))
    first = shop.settle(Job(request=request))
    kept = frozenset(field.name for field in fields(GenerateRequest))

    def make(asked: GenerateRequest, where: str) -> tuple[Pixels, Texts]:
        settled = shop.settle(Job(request=asked, where=where, stated=kept))
        models = shop.ready(settled)
        (picture,) = generate(settled.plan, models, report)
        return picture.pixels, record(settled.plan, models, picture.seed, tile=picture.tile).texts()

    known = record(first.plan, first.models, request.seed)
    hashes = {name: model.sha256 for name, model in known.models.items()}
    hashes |= {f"lora {lora.name}": lora.sha256 for lora in known.loras}
    assert isinstance(first.plan.request, GenerateRequest)
    return make, hashes, replace(first.job.request, seed=request.seed)


class _Quietly:
    """Passes warnings on, each once; thousands of pictures would say the same notes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        """Not passed on."""

    def warn(self, text: str) -> None:
        """Once."""
        if text not in self._said:
            self._said.add(text)
            self._console.warn(text)

    def progress(self, items: Any, description: str, *, total: int | None = None) -> Any:
        """The bar of one picture."""
        return self._console.progress(items, description, total=total)
