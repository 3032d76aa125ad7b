"""Files of prompts: a request a line, as JSON or as ``prompt --n negative --w 1024 --h 832 --d 7 --l 5 --s 28``.

The second form is the one of kohya's sd-scripts (``--from_file``, and the sample prompts of its training scripts),
with its letters, and with every flag of ``sdxl generate`` written out besides. A value goes on until the next
``--name``, so that prompts need no quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.values import field_name, is_flag, is_list, typed

KOHYA = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "l": "cfg_scale",
    "s": "steps",
    "ss": "sampler",
    "t": "strength",
}
"""sd-scripts' letters, and what they are called here."""

_PAIRS = {
    "original_size": ("ow", "oh", "x"),
    "negative_original_size": ("nw", "nh", "x"),
    "crop_top_left": ("ct", "cl", ","),
}
"""Fields that sd-scripts gives in two halves."""

_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
_JSON = re.compile(r'\{\s*["}]')
OUTPUT = "output"
"""A key beside the fields: where this line's pictures go."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one line asks for, beside what all ask for."""

    where: str
    """``prompts.txt:3``."""
    changes: Mapping[str, Any]
    """Field -> value."""
    output: str | None = None


class LineReader:
    """Reads lines into changes of a request of class ``cls``."""

    def __init__(self, cls: type[Any], aliases: Mapping[str, str]) -> None:
        """``aliases``: flag without its dashes -> field, such as ``guidance-scale`` -> ``cfg_scale``."""
        self._cls = cls
        self._aliases = {**aliases, **KOHYA, OUTPUT: OUTPUT, "o": OUTPUT}

    def read(self, text: str, where: str) -> Line | None:
        """One line; None for one that is empty or a comment (``#``).

        Raises:
            UsageError: an unknown setting or a value that is none; the text begins with ``where``.
        """
        text = text.strip()
        if not text or text.startswith("#"):
            return None
        changes = self._json(text, where) if _JSON.match(text) else self._flags(text, where)
        output = changes.pop(OUTPUT, None)
        if output is not None and not isinstance(output, str):
            raise UsageError(f"{where}: output: expected a path, got {output!r}")
        return Line(where, changes, output)

    def _json(self, text: str, where: str) -> dict[str, Any]:
        try:
            table = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{where}: is not one line of JSON ({error})") from error
        changes: dict[str, Any] = {}
        for key, value in table.items():
            field = key if key == OUTPUT else field_name(self._cls, key, self._aliases, where)
            if field in changes:
                raise UsageError(f"{where}: {field.replace('_', '-')} is given twice")
            if field != OUTPUT and isinstance(value, str) and is_list(self._cls, field):
                value = [value]
            changes[field] = value
        return changes

    def _flags(self, text: str, where: str) -> dict[str, Any]:
        prompt, *parts = _FLAG.split(text)
        changes: dict[str, Any] = {"prompt": prompt.strip()} if prompt.strip() else {}
        halves: dict[str, str] = {}
        for part in parts:
            name, _, value = part.partition(" ")
            name, equals, attached = name.partition("=")
            value = _unquoted(attached if equals else value)
            if name in {letter for first, second, _ in _PAIRS.values() for letter in (first, second)}:
                halves[name] = value
            else:
                self._add(changes, name, value, where)
        for field, (first, second, between) in _PAIRS.items():
            if first in halves or second in halves:
                if not (first in halves and second in halves):
                    raise UsageError(f"{where}: --{first} and --{second} belong together; give both")
                changes[field] = f"{halves[first]}{between}{halves[second]}"
        return changes

    def _add(self, changes: dict[str, Any], name: str, value: str, where: str) -> None:
        if self._aliases.get(name) == OUTPUT:
            changes[OUTPUT] = value
            return
        field = field_name(self._cls, name, self._aliases, where)
        if not value and is_flag(self._cls, field):
            value = "true"
        elif not value and field not in ("prompt", "negative_prompt"):
            raise UsageError(f"{where}: --{name} needs a value")
        found = typed(self._cls, field, value, where)
        if is_list(self._cls, field) and isinstance(changes.get(field), list):
            changes[field] += found
        elif field in changes:
            raise UsageError(f"{where}: --{name} is given twice")
        else:
            changes[field] = found


def read_lines(lines: Iterable[str], name: str, reader: LineReader) -> list[Line]:
    """All requests of a file.

    Args:
        lines: its lines.
        name: the file's, for errors and labels.
        reader: knows the fields.

    Raises:
        UsageError: lines that cannot be read, each with its number; or there are no requests at all.
    """
    found: list[Line] = []
    wrong: list[str] = []
    for number, text in enumerate(lines, 1):
        try:
            line = reader.read(text.removeprefix("\ufeff"), f"{name}:{number}")
        except UsageError as error:
            wrong.append(str(error))
            continue
        if line is not None:
            found.append(line)
    if wrong:
        raise UsageError("; ".join(wrong))
    if not found:
        raise UsageError(f"{name}: has no prompts; write one a line")
    return found


def _unquoted(text: str) -> str:
    """Without the quotes that people who know a shell put around a value."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text
