"""Running a study: pictures are made, measured, laid into a grid and written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.console import get as console
from sdxl_cli.console import to_jsonable
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.grid import Sheet, draw, grid_texts
from sdxl_cli.generation.jobs import Job, Settled, Workshop
from sdxl_cli.generation.picture import Pixels, Texts, write_picture
from sdxl_cli.generation.pipeline import generate, record
from sdxl_cli.generation.plan import size_multiple
from sdxl_cli.generation.request import GenerateRequest, with_seed
from sdxl_cli.generation.sizes import Size
from sdxl_cli.inspection import page
from sdxl_cli.inspection.studies.base import About, Design, Outcome, PictureStudy, Place, StudyRequest
from sdxl_cli.inspection.studies.conditions import CropStudy, SizeStudy
from sdxl_cli.inspection.studies.formats import AspectStudy, RefinerStudy

T = TypeVar("T")
Buckets = Callable[[int], Sequence[Size]]
"""Native side -> (height, width) of the sizes that models of it are trained on."""

STUDIES: dict[str, PictureStudy] = {
    study.name: study for study in (SizeStudy(), CropStudy(), AspectStudy(), RefinerStudy())
}
LEVELS = "levels"
"""The study that makes no pictures: :mod:`sdxl_cli.inspection.studies.levels`."""

GRID, RECORD, REPORT, PICTURES = "grid.png", "study.json", "report.html", "pictures"

PAPER_PROMPTS = (
    "A robot painted as graffiti on a brick wall. a sidewalk is in front of the wall, and grass is growing out of "
    "cracks in the concrete.",
    "Panda mad scientist mixing sparkling chemicals, artstation.",
    "An astronaut riding a pig, highly realistic dslr photo, cinematic shot.",
    "A capybara made of lego sitting in a realistic, natural field.",
)
"""Of the paper's figures 3 and 4."""
BUNDLED_PROMPTS = ("a strawberry", "an apple", "a cat", "a banana on a blue background")
"""What the bundled model has words for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A study that was run."""

    study: str
    title: str
    model: str
    prompts: tuple[str, ...]
    request: GenerateRequest
    """What all pictures have in common."""
    outcome: Outcome
    pictures: int
    files: tuple[Path, ...]


def require_room(folder: Path) -> None:
    """Refuse to overwrite, before any work is done.

    Raises:
        FileError: the folder has a study already.
    """
    for name in (GRID, RECORD, REPORT, PICTURES):
        if (folder / name).exists():
            raise FileError(f"{folder / name} exists already; give another --output folder")


def default_prompts(files: ModelFiles) -> tuple[str, ...]:
    """Prompts that a model can be expected to know."""
    return BUNDLED_PROMPTS if files.is_bundled else PAPER_PROMPTS


def about(settled: Settled, buckets: Buckets) -> About:
    """What a study has to know of the model of a settled job."""
    config = settled.files[0].config
    return About(
        native=config.native_size,
        buckets=tuple(buckets(config.native_size)),
        multiple=size_multiple(*(files.config for files in settled.files)),
    )


def run(asked: StudyRequest, base: GenerateRequest, shop: Workshop, buckets: Buckets) -> Result:
    """Make the pictures of a study, measure and write them.

    Args:
        asked: the study.
        base: what all pictures have in common.
        shop: finds and opens models.
        buckets: for ratios, and for the study of formats.

    Raises:
        UsageError, FileError, NumericError: as when pictures are made.
    """
    study = STUDIES[asked.study]
    if asked.values and not study.values_are:
        raise UsageError(f"--values: the study {study.name} has none")
    require_room(asked.output)
    base = with_seed(replace(base, num_images=1))
    # only to see what the model is: nothing is loaded
    first = shop.settle(Job(request=replace(base, refiner=None)))
    if study.needs_refiner and base.refiner is None:
        base = replace(base, refiner="bundled" if first.files[0].is_bundled else "refiner")
    asked = replace(asked, prompts=asked.prompts or default_prompts(first.files[0]))
    design = study.design(asked, base, about(first, buckets))
    console().note(f"{study.title}: {len(design.frames)} pictures")
    pictures, paths = _made(design, shop, asked.output)
    outcome = study.measure(pictures, design)
    shown, cells = study.extra(pictures, design)
    grid, grid_path = _grid(study, shown, cells, paths, asked.output)
    result = Result(
        study=study.name,
        title=study.title,
        model=first.files[0].name,
        prompts=asked.prompts,
        request=base,
        outcome=outcome,
        pictures=len(pictures),
        files=(grid_path, asked.output / RECORD, asked.output / REPORT),
    )
    write(result, grid, asked.output)
    return result


def write(result: Result, grid: Pixels, folder: Path) -> None:
    """The numbers as JSON and all of it as a report; the grid is there already."""
    outcome = result.outcome
    with atomic_write(folder / RECORD, overwrite=False) as temporary:
        text = json.dumps(to_jsonable(result), indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    lead = f"{result.model}, {result.pictures} pictures, {result.request.steps} steps, seed {result.request.seed}."
    curve = page.lines(outcome.curves, across=outcome.across, logarithmic=outcome.logarithmic)
    said = outcome.says[:1].upper() + outcome.says[1:]
    parts = [
        page.paragraph(f"{said}."),
        page.whole(Image.fromarray(grid), result.title),
        page.heading("Measured"),
        page.table(outcome.head, outcome.table),
        page.charts([(curve, "the means of the table")]) if curve else "",
        page.heading("Prompts"),
        page.table(("prompt",), [(prompt,) for prompt in result.prompts]) if result.prompts else "",
    ]
    page.write_page(folder / REPORT, result.title, lead, parts)


def _made(design: Design, shop: Workshop, folder: Path) -> tuple[dict[Place, Pixels], dict[Place, Path]]:
    """The pictures by place, and the files they were written to; each says how it was made."""
    jobs = [
        Job(request=frame.request, stated=frozenset(("prompt", "size")), line=index)
        for index, frame in enumerate(design.frames)
    ]
    places = {job.line: frame.place for job, frame in zip(jobs, design.frames, strict=True)}
    settled = shop.settle_all(jobs)
    pixels: dict[Place, Pixels] = {}
    files: dict[Place, Path] = {}
    listener = _Silent()
    for one in console().progress(settled, "making pictures", total=len(settled)):
        models = shop.ready(one)
        place = places[one.job.line]
        (picture,) = generate(one.plan, models, listener)
        path = folder / PICTURES / f"row{place[1]:02d}-column{place[0]:02d}.png"
        write_picture(path, picture.pixels, record(one.plan, models, picture.seed).texts())
        pixels[place], files[place] = picture.pixels, path
    return pixels, files


def _grid(
    study: PictureStudy,
    design: Design,
    cells: Mapping[Place, Pixels],
    files: Mapping[Place, Path],
    folder: Path,
) -> tuple[Pixels, Path]:
    paths = dict(files)
    for place, pixels in cells.items():
        if place not in paths:
            paths[place] = folder / PICTURES / f"row{place[1]:02d}-column{place[0]:02d}.png"
            write_picture(paths[place], pixels, Texts())
    sheet = Sheet(study.title, design.columns, design.rows, paths)
    drawn = draw(sheet, design.captions)
    write_picture(folder / GRID, drawn, grid_texts(sheet))
    return np.asarray(drawn), folder / GRID


class _Silent:
    """Says warnings once and nothing else: the bar counts pictures."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """See :class:`~sdxl_cli.generation.pipeline.Reporter`."""
        if text not in self._said:
            self._said.add(text)
            console().warn(text)

    def progress(self, items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
        """See :class:`~sdxl_cli.generation.pipeline.Reporter`."""
        return iter(items)
