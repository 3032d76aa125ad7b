"""Sweeps: the same picture over all values of a setting, and over all combinations of several."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.values import changed, field_name, is_number, typed

SEARCH_REPLACE = "prompt-sr"
"""Replaces the first of the values in the prompts by each of them (A1111's "Prompt S/R")."""

_NUMBER = r"-?\d+(?:\.\d+)?"
_BY_STEP = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})(?:\s*\(([+-]?\d+(?:\.\d+)?)\))?")
_BY_COUNT = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})\s*\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Axis:
    """One ``--sweep``."""

    name: str
    """As typed: ``cfg-scale``."""
    values: tuple[str, ...]
    """As typed."""
    field: str | None
    """The field that changes; None for :data:`SEARCH_REPLACE`."""

    def apply(self, request: GenerateRequest, value: str) -> GenerateRequest:
        """The request with one of the values.

        Raises:
            UsageError: not a value of that field, or a text to replace that is in no prompt.
        """
        where = f"--sweep {self.name}={value}"
        if self.field is None:
            return _replaced(request, self.values[0], value, where)
        return changed(request, {self.field: typed(type(request), self.field, value, where)}, where)

    def label(self, value: str) -> str:
        """What a grid writes beside a row or above a column."""
        return value if self.field in (None, "prompt") else f"{self.name} {value}"


def parse_sweep(text: str, aliases: Mapping[str, str]) -> Axis:
    """``"cfg-scale=3,5,7"`` to its axis.

    Values are separated by commas; one that has a comma goes in double quotes. Numbers may also be ranges as in
    A1111: ``1-5``, ``10-30(+10)``, ``0-1[5]`` for five values in all.

    Args:
        text: what ``--sweep`` says.
        aliases: other names of fields.

    Raises:
        UsageError: not a sweep, an unknown field, or a value that is none.
    """
    where = f"--sweep {text}"
    name, equals, rest = text.partition("=")
    values = [value.strip() for value in next(csv.reader([rest], skipinitialspace=True), [])]
    if not equals or not name.strip() or not any(values):
        raise UsageError(f"{where}: expected NAME=VALUE,VALUE, for example --sweep cfg-scale=3,5,7")
    name = name.strip().lstrip("-").replace("_", "-")
    if name == SEARCH_REPLACE:
        return Axis(name, tuple(values), None)
    field = field_name(GenerateRequest, name, aliases, where)
    if is_number(GenerateRequest, field):
        values = [number for value in values for number in _numbers(value, where)]
    for value in values:
        typed(GenerateRequest, field, value, where)
    return Axis(name, tuple(values), field)


def parse_sweeps(texts: Sequence[str], aliases: Mapping[str, str]) -> list[Axis]:
    """All sweeps of a command line.

    Raises:
        UsageError: see :func:`parse_sweep`; or a field is swept twice.
    """
    axes = [parse_sweep(text, aliases) for text in texts]
    for index, axis in enumerate(axes):
        if axis.field is not None and axis.field in [other.field for other in axes[:index]]:
            raise UsageError(f"--sweep {axis.name}: is swept twice; give all values in one --sweep")
    return axes


def combinations(
    request: GenerateRequest, axes: Sequence[Axis]
) -> Iterator[tuple[tuple[int, ...], GenerateRequest]]:
    """Every combination, with its place on each axis: the first axis changes fastest, as a grid is read.

    Raises:
        UsageError: a combination is not a request.
    """
    for places in product(*(range(len(axis.values)) for axis in reversed(axes))):
        cell = tuple(reversed(places))
        made = request
        for axis, place in zip(axes, cell, strict=True):
            made = axis.apply(made, axis.values[place])
        yield cell, made


def _numbers(text: str, where: str) -> list[str]:
    """A number, or all the numbers of a range."""
    if match := _BY_COUNT.fullmatch(text):
        low, high, count = float(match[1]), float(match[2]), int(match[3])
        if count < 2:
            raise UsageError(f"{where}: {text}: a range has at least 2 values")
        return [f"{low + (high - low) * i / (count - 1):g}" for i in range(count)]
    if match := _BY_STEP.fullmatch(text):
        low, high = float(match[1]), float(match[2])
        step = float(match[3]) if match[3] else math.copysign(1, high - low)
        if step == 0 or (high - low) / step < 0:
            raise UsageError(f"{where}: {text}: steps of {step:g} do not lead from {low:g} to {high:g}")
        # a step of 0.1 is not one in binary: an end that is missed by a rounding error is there
        return [f"{low + i * step:.10g}" for i in range(int((high - low) / step + 1e-9) + 1)]
    return [text]


def _replaced(request: GenerateRequest, search: str, value: str, where: str) -> GenerateRequest:
    texts: dict[str, Any] = {
        name: getattr(request, name)
        for name in ("prompt", "negative_prompt", "prompt_2")
        if search in (getattr(request, name) or "")
    }
    if not texts:
        raise UsageError(f"{where}: {search!r}, the first of the values, is in no prompt")
    return changed(request, {name: text.replace(search, value) for name, text in texts.items()}, where)
