"""Making a picture again from what it says, and naming what differs."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.errors import FileError
from sdxl_cli.generation.jobs import Job, Workshop
from sdxl_cli.generation.metadata import Record, Stored
from sdxl_cli.generation.picture import Pixels, Texts, read_pixels, write_picture
from sdxl_cli.generation.pipeline import Models, Reporter, generate, record, refine
from sdxl_cli.generation.plan import plan_refinement, size_multiple
from sdxl_cli.generation.request import GenerateRequest, RefineRequest
from sdxl_cli.generation.session import fit_to_model, open_weights, source_of, source_record
from sdxl_cli.generation.values import changed

_ORDER = ("models", "loras", "source", "request", "resolved", "run", "sdxl", "format", "kind")
"""Parts of a record, those first that explain most; others follow."""
_PATHS = tuple(
    f"request.{name}"
    for name in (
        "model",
        "refiner",
        "vae",
        "init_img",
        "mask",
        "lora",
        "lora_dir",
        "embedding",
        "embeddings_dir",
    )
)
"""Where files lie; what is in them is compared by hash."""
Difference = tuple[str, Any, Any]
"""(what, in the picture, now)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two pictures, pixel by pixel."""

    sizes: tuple[tuple[int, int], tuple[int, int]]
    """(height, width) of the picture, and now."""
    differing: int = 0
    """Pixels that differ."""
    largest: int = 0
    """Difference of one channel, 0 … 255."""
    psnr: float | None = None
    """In dB; None when identical or of different sizes."""
    first: tuple[int, int] | None = None
    """(row, column) of the first pixel that differs, in reading order."""
    values: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Its RGB in the picture, and now."""

    @property
    def identical(self) -> bool:
        """Whether every pixel is the same."""
        return self.sizes[0] == self.sizes[1] and self.differing == 0

    def __str__(self) -> str:
        (height, width), (other_height, other_width) = self.sizes
        if self.sizes[0] != self.sizes[1]:
            return f"another size: {width}x{height} in the picture, {other_width}x{other_height} now"
        if self.first is None or self.values is None:
            return f"identical: every pixel of {width}x{height}"
        share = 100 * self.differing / (height * width)
        return (
            f"pixels differ: the first is row {self.first[0]}, column {self.first[1]}: {self.values[0]} in the "
            f"picture, {self.values[1]} now; {share:.3g} % differ, by {self.largest} at most, "
            f"PSNR {self.psnr:.1f} dB"
        )


def compare(before: Pixels, now: Pixels) -> Comparison:
    """Compare two pictures, RGB [H, W, 3] uint8."""
    sizes = ((before.shape[0], before.shape[1]), (now.shape[0], now.shape[1]))
    if before.shape != now.shape:
        return Comparison(sizes)
    distance = np.abs(before.astype(np.int16) - now)
    differs = distance.any(axis=2)
    if not differs.any():
        return Comparison(sizes)
    row, column = (int(at) for at in np.argwhere(differs)[0])
    return Comparison(
        sizes,
        differing=int(differs.sum()),
        largest=int(distance.max()),
        psnr=float(10 * np.log10(255**2 / np.mean(distance.astype(np.float64) ** 2))),
        first=(row, column),
        values=(tuple(map(int, before[row, column])), tuple(map(int, now[row, column]))),
    )


def remake(
    picture: Path,
    stored: Stored,
    shop: Workshop,
    locate: Callable[[RefineRequest], ModelFiles],
    report: Reporter,
) -> tuple[Pixels, Record]:
    """Make the picture again.

    Args:
        picture: the file, beside which sources are looked for.
        stored: what it says.
        shop: opens the models of ``generate``.
        locate: finds the model of ``refine``.
        report: is told how it goes.

    Returns:
        The pixels as they come back from a file of the picture's format, and the new record.

    Raises:
        FileError: a picture that it was made from is not here, or is another one now.
    """
    if isinstance(stored.request, RefineRequest):
        pixels, made = _refined(picture, stored, stored.request, locate, report)
    else:
        assert isinstance(stored.request, GenerateRequest)
        request = _with_sources(picture, stored, replace(stored.request, num_images=1))
        settled = shop.settle(Job(request=request))
        models = shop.ready(settled)
        (result,) = list(generate(settled.plan, models, report))
        pixels = result.pixels
        made = record(settled.plan, models, result.seed, source=source_of(settled.plan.request))
    return through_file(pixels, picture.suffix), made


def through_file(pixels: Pixels, suffix: str) -> Pixels:
    """The pixels as they come back from a file of that format: JPEG changes them, always in the same way."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"picture{suffix}"
        write_picture(path, pixels, Texts())
        return read_pixels(path)


def differences(stored: Stored, now: Record) -> list[Difference]:
    """Everything that the picture's record says otherwise than the new one, what explains most first."""
    # the request as it is read now: fields that came later have the values they had before they were there
    before = _flat({**stored.raw, "request": json.loads(json.dumps(asdict(stored.request)))})
    after = _flat(json.loads(now.to_json()))
    keys = sorted({*before, *after}, key=lambda key: (_rank(key), key))
    return [
        (key, before.get(key), after.get(key))
        for key in keys
        if key not in _PATHS and before.get(key) != after.get(key)
    ]


def _rank(key: str) -> int:
    part = key.split(".")[0]
    return _ORDER.index(part) if part in _ORDER else len(_ORDER)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested tables as ``a.b.c`` -> value, lists of tables as ``a.0.b``. What a source says of itself is its own."""
    if name == "source.sdxl":
        return {}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{name}.{key}" if name else str(key))
    return flat


def _refined(
    picture: Path,
    stored: Stored,
    request: RefineRequest,
    locate: Callable[[RefineRequest], ModelFiles],
    report: Reporter,
) -> tuple[Pixels, Record]:
    path = _source(picture, stored.raw.get("source"), None)
    (weights,) = open_weights([locate(request)], request, report)
    pixels = fit_to_model(read_pixels(path), size_multiple(weights.config), path.name, report)
    plan = plan_refinement(request, (pixels.shape[0], pixels.shape[1]), weights.formulation)
    result = refine(plan, pixels, weights, report)
    made = record(plan, Models(base=weights), result.seed, kind="refine", source=source_record(path))
    return result.pixels, made


def _with_sources(picture: Path, stored: Stored, request: GenerateRequest) -> GenerateRequest:
    """The request with the pictures it starts from where they are now."""
    source = stored.raw.get("source")
    if request.init_img is None:
        return request
    found = {"init_img": str(_source(picture, source, request.init_img))}
    if request.mask is not None:
        found["mask"] = str(_source(picture, (source or {}).get("mask"), request.mask))
    return changed(request, found, picture.name)


def _source(picture: Path, source: Mapping[str, Any] | None, typed: str | None) -> Path:
    """The file a picture was made from: where it was, beside the picture, or here; the hash decides."""
    name, sha256 = (source or {}).get("name"), (source or {}).get("sha256")
    places: Sequence[Path] = [Path(typed).expanduser()] if typed else []
    if name:
        places = [*places, picture.parent / name, Path(name)]
    there = [path for path in places if path.is_file()]
    for path in there:
        if sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    if there:
        raise FileError(
            f"{there[0]}: is not the file {picture.name} was made from any more; its hash differs"
        )
    raise FileError(f"{picture.name}: was made from {name or typed}, which is neither here nor beside it")
