"""Pictures made by a model, measured as they come: the paper's Figure 12."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdxl_cli.evaluation.distribution import LOGITS, POOL, clip_columns
from sdxl_cli.evaluation.networks import Networks
from sdxl_cli.evaluation.pictures import Framing, Pixels
from sdxl_cli.evaluation.table import USED, Columns, Table
from sdxl_cli.generation.picture import Texts, read_pixels, write_picture
from sdxl_cli.generation.request import GenerateRequest

Make = Callable[[GenerateRequest, str], tuple[Pixels, Texts]]
"""Makes the one picture of a request, called by what it is for; gives its pixels and what it remembers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Which pictures are made: one for every number, with a prompt and a seed of its own."""

    prompts: Sequence[str]
    count: int
    seed: int
    """Of the first; they count up."""

    def request(self, base: GenerateRequest, number: int) -> GenerateRequest:
        """What picture ``number`` is asked for as."""
        return replace(base, prompt=self.prompt(number), seed=self.seed + number, num_images=1)

    def prompt(self, number: int) -> str:
        """Evenly spread over the prompts when there are more of them than pictures, else from the start again."""
        total = len(self.prompts)
        return self.prompts[number * total // self.count if self.count < total else number % total]

    def settings(self) -> dict[str, Any]:
        """For the record."""
        used = "\n".join(self.prompt(number) for number in range(self.count))
        return {
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(used.encode()).hexdigest(),
            "samples": self.count,
            "seed": self.seed,
        }


def generated(
    samples: Samples,
    base: GenerateRequest,
    models: Mapping[str, str | None],
    make: Make,
    networks: Networks,
    framing: Framing,
    folder: Path,
    *,
    batch: int,
    keep: bool,
) -> Table:
    """Make and measure every picture; goes on where it stopped.

    Args:
        samples: which.
        base: the request that all share.
        models: name -> sha256 of the files that make them.
        make: makes one.
        networks: measure; those there are, are used.
        framing: what is done to pictures before the Inception network sees them. CLIP sees them whole.
        folder: of the table, and with ``keep`` of ``pictures/``.
        batch: pictures measured at once.
        keep: save the pictures; one that was saved is not made again.

    Raises:
        FileError: the folder was begun with other settings.
    """
    settings = {
        **samples.settings(),
        **networks.settings(),
        **framing.settings(),
        "batch": batch,
        "models": models,
        "request": _decides(base),
    }
    table = Table(folder, samples.count, settings)

    def picture(number: int) -> Pixels:
        path = folder / "pictures" / f"{number:06d}.png"
        if keep and path.is_file():
            return read_pixels(path)
        where = f"{folder.name}, picture {number + 1} of {samples.count}"
        pixels, texts = make(samples.request(base, number), where)
        if keep:
            write_picture(path, pixels, texts)
        return pixels

    def compute(rows: range) -> Columns:
        pictures = [picture(number) for number in rows]
        columns: Columns = {USED: torch.ones(len(rows), dtype=torch.uint8)}
        if networks.inception_file is not None:
            framed = [framing.apply(Image.fromarray(pixels)) for pixels in pictures]
            columns[POOL], columns[LOGITS] = networks.features(framed)
        if networks.clip_files is not None:
            columns |= clip_columns(networks, pictures, [samples.prompt(number) for number in rows])
        return columns

    table.fill(compute, batch=batch, description=f"generation, {folder.name}")
    return table


def _decides(request: GenerateRequest) -> dict[str, Any]:
    """Of a request what decides about the pictures, but for prompts and seeds, which have their own place."""
    apart = ("prompt", "seed", "num_images", "batch_size", "device", "vram")
    return {name: value for name, value in asdict(request).items() if name not in apart}
