"""``sdxl study``: the paper's figures, made with any model, and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli import console as consoles
from sdxl_cli import presets
from sdxl_cli.commands import _sampling as flags
from sdxl_cli.commands._options import Config, Json, Preset, Quiet, Set
from sdxl_cli.errors import UsageError, unknown

if TYPE_CHECKING:
    from sdxl_cli.console import Console
    from sdxl_cli.generation.request import GenerateRequest
    from sdxl_cli.inspection.studies.run import Result

PANEL = "Inspect"
STUDY = "Study"


def command(
    study: Annotated[
        str | None,
        typer.Argument(
            help="size, crop, aspect, refiner or levels; without one they are listed.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="A row of the grid; may be repeated.",
            metavar="TEXT",
            rich_help_panel=STUDY,
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            help="Rows for every prompt, each with its seed.", metavar="N", min=1, rich_help_panel=STUDY
        ),
    ] = 1,
    values: Annotated[
        list[str] | None,
        typer.Option(
            help="A column: a size for size, TOP,LEFT for crop, a size, a ratio or all for aspect; may be repeated.",
            metavar="X",
            rich_help_panel=STUDY,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Of levels: a folder of pictures, or a manifest.", metavar="PATH", rich_help_panel=STUDY
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(help="Of levels: pictures of --data.", metavar="N", min=1, rich_help_panel=STUDY)
    ] = 16,
    levels: Annotated[
        int,
        typer.Option(
            help="Of levels: noise levels, evenly spread.",
            metavar="N",
            min=1,
            max=1000,
            rich_help_panel=STUDY,
        ),
    ] = 20,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", "--ckpt", help="The base model.", metavar="FILE", rich_help_panel=flags.MODEL
        ),
    ] = None,
    refiner: Annotated[
        str | None,
        typer.Option(
            help="The refiner, for refiner and levels; default: the one of the model's family.",
            metavar="FILE",
            rich_help_panel=flags.MODEL,
        ),
    ] = None,
    vae: flags.Vae = None,
    lora: flags.Lora = None,
    negative_prompt: flags.NegativePrompt = None,
    size: Annotated[str | None, typer.Option(help="Of the pictures.", metavar="WxH")] = None,
    steps: flags.Steps = None,
    cfg_scale: flags.CfgScale = None,
    sampler: flags.Sampler = None,
    scheduler: flags.Scheduler = None,
    seed: flags.Seed = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    vram: flags.Vram = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for grid, report and pictures.", metavar="DIR"),
    ] = None,
    preset: Preset = None,
    config: Config = None,
    sets: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make the paper's figures with any model: a grid of pictures, a table, a measured number."""
    given = dict(locals())
    console = consoles.configure(quiet=quiet, json=as_json)
    if study is None:
        _list(console)
        return
    _check(given)
    result = _run(given, console)
    outcome = result.outcome
    console.table(outcome.head, outcome.table)
    console.print_result(outcome.says)
    for path in result.files:
        console.print_result(str(path))
    console.json(result)


def _list(console: Console) -> None:
    """Which studies there are."""
    from sdxl_cli.inspection.studies.levels import ABOUT
    from sdxl_cli.inspection.studies.run import LEVELS, STUDIES

    rows = [(one.name, one.title, one.about) for one in STUDIES.values()]
    rows.append((LEVELS, "Loss by noise level", ABOUT))
    console.table(("study", "title", "shows"), rows)
    console.json([{"study": name, "title": title, "shows": about} for name, title, about in rows])


def _check(given: dict[str, Any]) -> None:
    """Refuse names that are none, and flags that nothing would come of."""
    from sdxl_cli.inspection.studies.run import LEVELS, STUDIES

    name = given["study"]
    if name not in (*STUDIES, LEVELS):
        raise unknown("study", name, (*STUDIES, LEVELS))
    if name != LEVELS and given["data"] is not None:
        raise UsageError(f"--data: the study {name} makes its own pictures; levels looks at some")
    if name == "aspect" and given["size"] is not None:
        raise UsageError("--size: the study of formats gives it itself; see --values")


def _run(given: dict[str, Any], console: Console) -> Result:
    """Settle what is asked for and run it."""
    from sdxl_cli.commands.generate import _buckets, _locate
    from sdxl_cli.generation.fewstep import FewSteps
    from sdxl_cli.generation.jobs import Workshop
    from sdxl_cli.generation.request import GenerateRequest
    from sdxl_cli.inspection.studies.base import StudyRequest
    from sdxl_cli.inspection.studies.levels import run_levels
    from sdxl_cli.inspection.studies.run import LEVELS, run

    asked = StudyRequest(
        study=given["study"],
        prompts=tuple(given["prompt"] or ()),
        seeds=given["seeds"],
        values=tuple(given["values"] or ()),
        data=given["data"],
        images=given["images"],
        levels=given["levels"],
        output=given["output"] or Path("studies") / given["study"],
    )
    base = _base(given)
    stated = frozenset(
        name for name, value in flags.flags_of(GenerateRequest, given).items() if value is not None
    )
    shop = Workshop(lambda one: _locate(one, console), _buckets, console, FewSteps(stated, console))
    if given["study"] == LEVELS:
        return run_levels(asked, base, shop)
    return run(asked, base, shop, _buckets)


def _base(given: dict[str, Any]) -> GenerateRequest:
    """What all pictures have in common; seed 0 unless another is given, so that a study can be made again."""
    from sdxl_cli.generation.request import GenerateRequest

    said = flags.flags_of(GenerateRequest, given) | {"prompt": "", "seed": given["seed"] or 0}
    return presets.layered(
        GenerateRequest,
        preset=given["preset"] or "generate",
        config=given["config"],
        sets=given["sets"] or (),
        flags=said,
    )
