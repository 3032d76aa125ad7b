"""The loss at every noise level, of base and refiner: where each of them is the better one.

The same pictures, the same noise at every level and for every model. The error is that of the noise a model's answer
implies, mean((D(x; sigma) - z)²) / sigma², which for a model that predicts the noise is its training loss (sgm, weight
sigma^-2); and of the clean latent, mean((D - z)²).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdxl_cli.console import get as console
from sdxl_cli.data.hygiene import Hygiene, Refused, open_picture
from sdxl_cli.data.loader import read_image, to_tensor
from sdxl_cli.data.manifest import read_manifest
from sdxl_cli.data.sources import find
from sdxl_cli.data.storage import open_storage
from sdxl_cli.diffusion.denoiser import Denoiser
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.autoencode import decode
from sdxl_cli.generation.grid import Sheet, draw, grid_texts
from sdxl_cli.generation.jobs import Job, Settled, Workshop
from sdxl_cli.generation.picture import Pixels, Texts, write_picture
from sdxl_cli.generation.remember import Remembering
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.text_features import encode_text
from sdxl_cli.generation.weights import Weights
from sdxl_cli.inspection.inputs import MANIFESTS, chosen
from sdxl_cli.inspection.studies.base import Outcome, Place, StudyRequest
from sdxl_cli.inspection.studies.run import GRID, PICTURES, RECORD, REPORT, Result, require_room, write
from sdxl_cli.model.conditioning import MicroConditioning, conditioning_vector

TITLE = "Loss by noise level"
ABOUT = "the error of base and refiner at every noise level, on pictures with captions"
REFINED = 200
"""Levels from 0 on that the refiner was trained on (facts.md section 6)."""
SHOWN = 7
"""Columns of the grid."""


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and what the model is told about it."""

    name: str
    image: Tensor
    """[3, H, W] in -1 … 1."""
    caption: str
    micro: MicroConditioning


@dataclass(frozen=True, slots=True)
class Curve:
    """Of one model."""

    model: str
    eps: tuple[float, ...]
    """Mean squared error of the noise at every level."""
    clean: tuple[float, ...]
    """Of the clean latent."""
    shown: tuple[Tensor, ...]
    """What it takes for the clean latent of the first picture [1, z, h, w], at the levels of the grid."""


def run_levels(asked: StudyRequest, base: GenerateRequest, shop: Workshop) -> Result:
    """Measure and write; see :func:`sdxl_cli.inspection.studies.run.run`.

    Raises:
        UsageError: there is no ``data``.
    """
    if asked.data is None:
        raise UsageError("--data: this study looks at pictures; give a folder of them or a manifest")
    if asked.values or asked.prompts:
        raise UsageError(
            "--values and --prompt: this study takes captions from --data, and levels from --levels"
        )
    require_room(asked.output)
    settled = shop.settle(Job(request=replace(base, refiner=None)))
    refiner = base.refiner or ("bundled" if settled.files[0].is_bundled else None)
    if refiner is None:
        console().note("the base alone is measured; --refiner FILE adds a refiner")
    else:
        settled = shop.settle(Job(request=replace(base, refiner=refiner)))
    models = shop.ready(settled)
    factor = settled.files[0].config.vae.downsampling
    examples = list(load_examples(asked.data, asked.images, settled.files[0].config.native_size, factor))
    latents = _encoded(models.base, examples)
    places = spread_levels(asked.levels)
    curves = [
        _curve(name, weights, examples, latents, places, base) for name, weights in models.named().items()
    ]
    outcome = summary(places, models.base.formulation.schedule().sigmas, curves)
    grid = _grid(asked.output, models.base, examples, curves, places)
    models.release()
    result = Result(
        study=asked.study,
        title=TITLE,
        model=_names(settled),
        prompts=(),
        request=base,
        outcome=outcome,
        pictures=len(examples),
        files=(asked.output / GRID, asked.output / RECORD, asked.output / REPORT),
    )
    write(result, grid, asked.output)
    return result


def _names(settled: Settled) -> str:
    return " and ".join(files.name for files in settled.files)


def spread_levels(count: int) -> list[int]:
    """``count`` indices, evenly from 0 to 999, in the middle of parts of one size."""
    return [int((part + 0.5) * 1000 / count) for part in range(count)]


def load_examples(path: Path, limit: int, native: int, multiple: int) -> Iterator[Example]:
    """Pictures of a manifest as training has them, or of a folder, cut to squares of ``native`` pixels.

    Raises:
        FileError: there are none that can be used.
    """
    found = 0
    if path.suffix in MANIFESTS:
        manifest = read_manifest(path)
        for row in chosen(manifest.kept, limit):
            plan = row.plan
            micro = MicroConditioning(
                original_size=row.original_size or plan.resized_size,
                crop_top_left=plan.crop_top_left,
                target_size=plan.target_size,
            )
            found += 1
            yield Example(row.path, read_image(manifest, row), next(iter(row.captions), ""), micro)
    else:
        side = native - native % multiple
        for item in chosen(find(path).items, limit):
            try:
                image = open_picture(
                    open_storage(path).read(item.path), Hygiene(), suffix=Path(item.path).suffix
                ).image
            except Refused as refusal:
                console().warn(f"left out: {item.path}: {refusal}")
                continue
            pixels, crop = _square(image, side)
            micro = MicroConditioning(
                original_size=(image.height, image.width), crop_top_left=crop, target_size=(side, side)
            )
            found += 1
            yield Example(item.path, to_tensor(np.array(pixels)), next(iter(item.captions), ""), micro)
    if not found:
        raise FileError(f"{path}: has no pictures that can be used")


def _square(image: Image.Image, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The middle of a picture, its short side brought to ``side``; and what is cut off (top, left)."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    top, left = (height - side) // 2, (width - side) // 2
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + side, top + side)), (top, left)


@torch.inference_mode()
def _encoded(weights: Weights, examples: Sequence[Example]) -> list[Tensor]:
    """Scaled latents [1, z, h, w] on the CPU."""
    vae = weights.vae()
    made = [
        vae.to_latent(vae.encode(e.image[None].to(weights.device, weights.vae_dtype)).mode()).float().cpu()
        for e in console().progress(examples, "encoding", total=len(examples))
    ]
    weights.release()
    return made


@torch.inference_mode()
def _curve(
    name: str,
    weights: Weights,
    examples: Sequence[Example],
    latents: Sequence[Tensor],
    places: Sequence[int],
    request: GenerateRequest,
) -> Curve:
    """The errors of one model."""
    encoders = weights.text()
    reader = request.reader()
    texts = [encode_text(encoders, e.caption, None, weights.device, reader) for e in examples]
    weights.release()
    schedule = weights.formulation.schedule()
    unet = weights.unet()
    eps: list[list[float]] = [[] for _ in places]
    clean: list[list[float]] = [[] for _ in places]
    wanted = set(grid_places(places))
    shown = []
    for number, (example, z, text) in enumerate(
        console().progress(list(zip(examples, latents, texts, strict=True)), f"measuring the {name}")
    ):
        vector = conditioning_vector(weights.config, text.pooled, [example.micro])
        network = Remembering(unet)
        network.expect(text.crossattn, vector, places)
        denoiser = Denoiser(network, schedule, weights.formulation.prediction)
        noise = torch.randn(z.shape, generator=torch.Generator("cpu").manual_seed(request.seed + number))
        for at, place in enumerate(places):
            sigma = float(schedule.sigmas[place])
            x = (z + sigma * noise).to(weights.device)
            answer = denoiser(x, sigma, text.crossattn, vector).float().cpu()
            error = float((answer - z).double().square().mean())
            clean[at].append(error)
            eps[at].append(error / sigma**2)
            if not number and place in wanted:
                shown.append(answer)
    weights.release()
    return Curve(name, tuple(map(fmean, eps)), tuple(map(fmean, clean)), tuple(shown))


def grid_places(places: Sequence[int]) -> list[int]:
    """Those of the levels that are shown."""
    return [
        places[index] for index in sorted({round(i * (len(places) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    ]


def summary(places: Sequence[int], sigmas: Tensor, curves: Sequence[Curve]) -> Outcome:
    """The table, and who is better where."""
    table = tuple(
        (
            place,
            float(sigmas[place]),
            *(value for curve in curves for value in (curve.eps[at], curve.clean[at])),
            *([curves[1].eps[at] / curves[0].eps[at]] if len(curves) > 1 else []),
        )
        for at, place in enumerate(places)
    )
    heads = [f"{c.model}: {what}" for c in curves for what in ("loss (noise)", "error of the picture")]
    means = {
        f"{curve.model}_{part}": fmean(
            value
            for value, place in zip(curve.eps, places, strict=True)
            if (place < REFINED) == (part == "low")
        )
        for curve in curves
        for part in ("low", "high")
        if any((place < REFINED) == (part == "low") for place in places)
    }
    text = ", ".join(
        f"{curve.model} {means[f'{curve.model}_low']:.4g}"
        for curve in curves
        if f"{curve.model}_low" in means
    )
    above = ", ".join(
        f"{curve.model} {means[f'{curve.model}_high']:.4g}"
        for curve in curves
        if f"{curve.model}_high" in means
    )
    return Outcome(
        head=("level", "sigma", *heads, *(["refiner / base"] if len(curves) > 1 else [])),
        table=table,
        numbers=means,
        says=f"mean loss on levels 0 to {REFINED - 1}, which the refiner is for: {text or '-'}; above: {above or '-'}",
        curves={c.model: list(zip(map(float, places), c.eps, strict=True)) for c in curves},
        across="noise level",
        logarithmic=True,
    )


@torch.inference_mode()
def _grid(
    folder: Path,
    weights: Weights,
    examples: Sequence[Example],
    curves: Sequence[Curve],
    places: Sequence[int],
) -> Pixels:
    """What each model takes the first picture for, by noise level; the picture itself first."""
    original = ((examples[0].image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    cells: dict[Place, Path] = {}
    for row, curve in enumerate(curves):
        made = [original, *(decode(latent, weights) for latent in curve.shown)]
        for column, pixels in enumerate(made):
            cells[column, row] = folder / PICTURES / f"row{row:02d}-column{column:02d}.png"
            write_picture(cells[column, row], pixels, Texts())
    columns = ("the picture", *(f"from level {place}" for place in grid_places(places)))
    sheet = Sheet(
        f"One step from each noise level: {examples[0].name}", columns, [c.model for c in curves], cells
    )
    drawn = draw(sheet)
    write_picture(folder / GRID, drawn, grid_texts(sheet))
    return drawn
