"""How people write a prompt: emphasis by brackets, in the two dialects they use, or none of it.

A prompt becomes sections of weighted spans of text. What a weight does to the features is another matter
(:mod:`sdxl_cli.generation.emphasis`), and so is how spans become tokens (:mod:`sdxl_cli.generation.chunks`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from sdxl_cli.errors import UsageError

Syntax = Literal["a1111", "comfy", "raw"]
Emphasis = Literal["original", "no-norm"]
"""What A1111's weights do: "Original" or "No norm" in its settings."""

STEP = 1.1
"""What one pair of brackets without a number multiplies by."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a prompt, brackets and escapes resolved."""

    text: str
    weight: float = 1.0


Section = tuple[Span, ...]
"""What stands between two ``BREAK``: it begins a new chunk."""


def parse(text: str, syntax: Syntax, name: str = "prompt", *, composes: bool = True) -> tuple[Section, ...]:
    r"""Read a prompt.

    - ``a1111``: ``(more)`` is 1.1, ``[less]`` is 1/1.1, ``(word:1.3)`` is 1.3, nested ones multiply; what is left
      open ends at the end; ``\(`` is a bracket; ``BREAK`` begins a new section (modules/prompt_parser.py of
      stable-diffusion-webui, except that there a ``BREAK`` inside brackets is a word, here a break).
    - ``comfy``: ``(more)`` is 1.1 times what surrounds it, ``(word:1.3)`` is 1.3 whatever surrounds it; what is left
      open is plain text, and so are ``[ ]`` and ``BREAK`` (comfy/sd1_clip.py of ComfyUI).
    - ``raw``: the text as it is.

    Args:
        text: as typed.
        syntax: which of the three.
        name: what to call the text in an error.
        composes: whether A1111 would cut it at ``AND``; it does not do so with negative prompts.

    Returns:
        At least one section; spans may be empty, and weights any finite number.

    Raises:
        UsageError: the text changes in the course of sampling, or is several prompts in one. Both would be
            something else than the words they are made of.
    """
    if syntax == "a1111" and composes:
        _refuse_composition(text, name)
    return _PARSERS[syntax](text, name)


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_MARK = re.compile(rf"\\[()\[\]\\]|\\|\(|\[|:\s*({_NUMBER})\s*\)|\)|\]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_AND = re.compile(r"\bAND\b")
_SCHEDULED = re.compile(rf":\s*{_NUMBER}\s*$")
_LITERALLY = "to mean the characters, {how}, or give --prompt-syntax comfy or raw"


class _A1111:
    """The state of reading one prompt in A1111's dialect. Round and square brackets do not know of each other."""

    def __init__(self, text: str, name: str) -> None:
        self._text, self._name = text, name
        self._pieces: list[tuple[str | None, float]] = []
        """Text and weight; None is a break."""
        self._round: list[int] = []
        self._square: list[tuple[int, int]] = []

    def sections(self) -> tuple[Section, ...]:
        """Read all of it."""
        for match in _MARK.finditer(self._text):
            self._take(match)
        for start in self._round:
            self._scale(start, STEP)
        for start, _ in self._square:
            self._scale(start, 1 / STEP)
        return tuple(_merged(self._pieces))

    def _take(self, match: re.Match[str]) -> None:
        mark, weight = match.group(), match.group(1)
        if mark.startswith("\\"):
            self._pieces.append((mark[1:], 1.0))
        elif mark == "(":
            self._round.append(len(self._pieces))
        elif mark == "[":
            self._square.append((len(self._pieces), match.end()))
        elif mark.endswith(")") and self._round:
            self._scale(self._round.pop(), STEP if weight is None else float(weight))
        elif mark == "]" and self._square:
            start, opened = self._square.pop()
            _refuse_scheduling(self._text[opened : match.start()], self._name)
            self._scale(start, 1 / STEP)
        else:
            first, *others = _BREAK.split(mark)
            self._pieces.append((first, 1.0))
            for part in others:
                self._pieces += [(None, 1.0), (part, 1.0)]

    def _scale(self, start: int, factor: float) -> None:
        self._pieces[start:] = [(text, weight * factor) for text, weight in self._pieces[start:]]


def _merged(pieces: list[tuple[str | None, float]]) -> Iterator[Section]:
    """Pieces to sections. Neighbours of one weight are one span, so that ``(a)(b)`` is the word ``ab``."""
    spans: list[Span] = []
    for text, weight in [*pieces, (None, 1.0)]:
        if text is None:
            yield tuple(spans) or (Span(""),)
            spans = []
        elif spans and spans[-1].weight == weight:
            spans[-1] = Span(spans[-1].text + text, weight)
        else:
            spans.append(Span(text, weight))


def _refuse_composition(text: str, name: str) -> None:
    if _AND.search(text):
        raise UsageError(
            f"{name}: AND in capitals joins several prompts in A1111, which this program does not do; "
            + _LITERALLY.format(how="write 'and'")
        )


def _refuse_scheduling(inside: str, name: str) -> None:
    """``[from:to:0.5]``, ``[late:10]``, ``[early::10]`` and ``[a|b]`` change the prompt from step to step."""
    if _SCHEDULED.search(inside) or re.search(r"(?<!\\)\|", inside):
        raise UsageError(
            f"{name}: [{inside}] changes the prompt between steps in A1111, which this program does not do; "
            + _LITERALLY.format(how=rf"write \[{inside}\]")
        )


def _comfy(text: str, name: str) -> tuple[Section, ...]:
    """ComfyUI's dialect. Only round brackets can be escaped; a backslash elsewhere is a backslash."""
    closing, opening = "\0\1", "\0\2"
    hidden = text.replace("\\)", closing).replace("\\(", opening)
    spans = _comfy_spans(hidden, 1.0)
    return (tuple(Span(s.text.replace(closing, ")").replace(opening, "("), s.weight) for s in spans),)


def _comfy_spans(text: str, weight: float) -> list[Span]:
    spans: list[Span] = []
    for piece in _comfy_pieces(text):
        if not (piece.startswith("(") and piece.endswith(")") and len(piece) > 1):
            spans.append(Span(piece, weight))
            continue
        inside, inner = piece[1:-1], weight * STEP
        head, colon, number = inside.rpartition(":")
        if colon and head and (given := _finite(number)) is not None:
            inside, inner = head, given
        spans += _comfy_spans(inside, inner)
    return spans


def _comfy_pieces(text: str) -> Iterator[str]:
    """Cut at the outermost brackets. One ``)`` too many takes the meaning from the next ``(``, as it does there."""
    depth, start = 0, 0
    for at, letter in enumerate(text):
        if letter == "(":
            if depth == 0 and at > start:
                yield text[start:at]
                start = at
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                yield text[start : at + 1]
                start = at + 1
    if start < len(text):
        yield text[start:]


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


_PARSERS: dict[Syntax, Callable[[str, str], tuple[Section, ...]]] = {
    "a1111": lambda text, name: _A1111(text, name).sections(),
    "comfy": _comfy,
    "raw": lambda text, _: ((Span(text),),),
}
