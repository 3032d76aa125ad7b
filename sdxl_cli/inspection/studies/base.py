"""What a study is: pictures that differ by one thing, in rows and columns, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Protocol

from sdxl_cli.console import Cell
from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.sizes import Size

Place = tuple[int, int]
"""(column, row)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRequest:
    """What ``sdxl study`` was asked for."""

    study: str
    prompts: tuple[str, ...] = ()
    """None: some that suit the model."""
    seeds: int = 1
    """Pictures of every prompt in every column; a row has one seed."""
    values: tuple[str, ...] = ()
    """What the columns are; none: the study's own."""
    data: Path | None = None
    """Pictures, for studies that look at some."""
    images: int = 16
    """Of ``data``, how many are looked at, evenly spread."""
    levels: int = 20
    """Noise levels, for the study of them."""
    output: Path
    """Folder for everything that is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """The model, as far as a study has to know it."""

    native: int
    """Side of the squares it was trained on, in pixels."""
    buckets: tuple[Size, ...]
    """(height, width) it was trained on."""
    multiple: int
    """Sides are multiples of this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One picture to make."""

    place: Place
    request: GenerateRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """All pictures of a study."""

    columns: tuple[str, ...]
    """Labels."""
    rows: tuple[str, ...]
    frames: tuple[Frame, ...]
    captions: tuple[str, ...] = ()
    """Above every picture, row by row, instead of labels of columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was measured."""

    head: tuple[str, ...]
    """Of the table's columns."""
    table: tuple[tuple[Cell, ...], ...]
    numbers: Mapping[str, float]
    """What the study comes down to."""
    says: str
    """The same in a sentence."""
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """To draw: name -> (x, y)."""
    across: str = ""
    """What x is."""
    logarithmic: bool = False
    """Whether y is better drawn so."""


class PictureStudy(Protocol):
    """A study of pictures that are made for it."""

    name: str
    title: str
    about: str
    """One line for ``sdxl study --list``."""
    values_are: str
    """What ``--values`` gives; empty where the study has no such choice."""
    needs_refiner: bool

    def design(self, asked: StudyRequest, base: GenerateRequest, about: About) -> Design:
        """Which pictures to make; ``base`` has model, steps, seed and the like.

        Raises:
            UsageError: a value is none.
        """
        ...

    def extra(self, pictures: Mapping[Place, Pixels], design: Design) -> tuple[Design, dict[Place, Pixels]]:
        """The design and the pictures as they are shown: with enlargements, for instance."""
        ...

    def measure(self, pictures: Mapping[Place, Pixels], design: Design) -> Outcome:
        """The numbers, of the pictures that were made."""
        ...


def rows_of(asked: StudyRequest, base: GenerateRequest) -> list[tuple[str, str, int]]:
    """A row for every prompt and seed: (label, prompt, seed)."""
    several = asked.seeds > 1
    return [
        (f"{prompt}, seed {base.seed + index}" if several else prompt, prompt, base.seed + index)
        for prompt in asked.prompts
        for index in range(asked.seeds)
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of those that are numbers, and its standard error; None of fewer than two."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return math.nan, None
    return fmean(known), stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None


def with_error(values: Sequence[float], digits: int = 3) -> str:
    """``0.123 ± 0.004``."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")
