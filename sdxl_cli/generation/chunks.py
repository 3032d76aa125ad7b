"""Weighted spans of text to rows of 77 token ids, as many as the prompt needs.

Both front ends cut a long prompt into chunks of 75 tokens with a start and an end token each, and join the features
along the token axis; they differ in where they cut. Nothing is ever left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdxl_cli.generation.prompt import CONTEXT_LENGTH, END, MAX_TOKENS, START, Tokenizer
from sdxl_cli.generation.prompt_syntax import Section, Span, Syntax

BACKTRACK = 20
"""A1111's "prompt word wrap length limit": a chunk ends at a comma among its last 20 tokens, if there is one."""
COMMA = 267
"""Token id of a comma that ends a word."""
_LONG_WORD = 8
"""ComfyUI keeps words of fewer tokens whole."""


@dataclass(frozen=True, slots=True)
class Vector:
    """One learned vector of a textual inversion."""

    name: str
    index: int


@dataclass(frozen=True, slots=True)
class Token:
    """A position that the text encoders read."""

    id: int
    """0 where a learned vector stands in its place: any id below that of the end token would do."""
    weight: float = 1.0
    vector: Vector | None = None


Unit = tuple[Token, ...]
"""Tokens that are kept together as far as possible."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the text encoders read at a time: at most 75 tokens."""

    tokens: tuple[Token, ...] = ()

    def row(self, padding: int) -> list[int]:
        """The 77 ids: start, tokens, end, ``padding``."""
        ids = [START, *(token.id for token in self.tokens), END]
        return ids + [padding] * (CONTEXT_LENGTH - len(ids))

    def weights(self) -> list[float]:
        """The 77 weights; start, end and padding have 1."""
        weights = [1.0, *(token.weight for token in self.tokens)]
        return weights + [1.0] * (CONTEXT_LENGTH - len(weights))

    def vectors(self) -> Iterator[tuple[int, Vector]]:
        """Positions in the row that a learned vector takes."""
        return ((at, token.vector) for at, token in enumerate(self.tokens, 1) if token.vector is not None)


def chunks(
    sections: Sequence[Section],
    syntax: Syntax,
    tokenizer: Tokenizer,
    embeddings: Mapping[str, int] | None = None,
    *,
    bare: bool = True,
) -> list[Chunk]:
    """Tokenize a parsed prompt and cut it.

    Args:
        sections: from :func:`sdxl_cli.generation.prompt_syntax.parse`.
        syntax: decides where a long prompt is cut: for ``a1111`` and ``raw`` at a comma among the last 20 tokens of a
            chunk, for ``comfy`` between words.
        tokenizer: of both text encoders.
        embeddings: names of learned embeddings and how many vectors each has.
        bare: whether their names alone, without ``embedding:``, stand for them too.

    Returns:
        At least one chunk; the first of an empty prompt is empty.
    """
    pattern = reference(embeddings or {}, bare=bare)
    units = [
        [unit for span in section for unit in _UNITS[syntax](span, tokenizer, pattern, embeddings or {})]
        for section in sections
    ]
    if syntax == "comfy":
        return _at_words(unit for section in units for unit in section)
    return _at_commas(units)


def reference(names: Iterable[str], *, bare: bool) -> re.Pattern[str] | None:
    """What matches a mention of one of ``names``, ignoring case; None when there are no names. Long names first."""
    ordered = sorted(names, key=len, reverse=True)
    if not ordered:
        return None
    # a part of a longer word is not the name: "style" is not in "styles", "style-2" or "my_style"
    either = "|".join(re.escape(name) for name in ordered)
    prefix = r"(?:(?:embedding:)|(?<![\w-]))" if bare else "embedding:"
    return re.compile(rf"{prefix}(?P<name>{either})(?:\.(?:safetensors|pt|bin))?(?![\w-])", re.IGNORECASE)


def _pieces(
    text: str, pattern: re.Pattern[str] | None, embeddings: Mapping[str, int]
) -> Iterator[str | tuple[str, int]]:
    """Text and, in between, the embeddings mentioned: name and number of vectors."""
    if pattern is None:
        yield text
        return
    by_name = {name.lower(): name for name in embeddings}
    start = 0
    for match in pattern.finditer(text):
        yield text[start : match.start()]
        name = by_name[match["name"].lower()]
        yield name, embeddings[name]
        start = match.end()
    yield text[start:]


def _learned(name: str, count: int, weight: float) -> Unit:
    return tuple(Token(0, weight, Vector(name, index)) for index in range(count))


def _tokens(
    span: Span, tokenizer: Tokenizer, pattern: re.Pattern[str] | None, embeddings: Mapping[str, int]
) -> Iterator[Unit]:
    """Every token by itself; the vectors of an embedding together."""
    for piece in _pieces(span.text, pattern, embeddings):
        if isinstance(piece, str):
            yield from ((Token(token, span.weight),) for token in tokenizer.encode(piece))
        else:
            yield _learned(*piece, span.weight)


def _words(
    span: Span, tokenizer: Tokenizer, pattern: re.Pattern[str] | None, embeddings: Mapping[str, int]
) -> Iterator[Unit]:
    """The tokens of everything between two spaces together."""
    for piece in _pieces(span.text, pattern, embeddings):
        if isinstance(piece, str):
            for word in piece.split():
                yield tuple(Token(token, span.weight) for token in tokenizer.encode(word))
        else:
            yield _learned(*piece, span.weight)


_UNITS: dict[Syntax, Callable[..., Iterator[Unit]]] = {"a1111": _tokens, "raw": _tokens, "comfy": _words}


def _at_commas(sections: Iterable[Iterable[Unit]]) -> list[Chunk]:
    """A1111's cuts (modules/sd_hijack_clip.py): every section begins a chunk.

    Unlike there, learned vectors after the comma move along with the other tokens.
    """
    done: list[Chunk] = []
    current: list[Token] = []
    for number, section in enumerate(sections):
        if number:
            done.append(Chunk(tuple(current)))
        current, comma = [], -1
        for unit in section:
            if unit[0].id == COMMA:
                comma = len(current)
            elif len(current) == MAX_TOKENS and comma >= 0 and MAX_TOKENS - comma <= BACKTRACK:
                done.append(Chunk(tuple(current[: comma + 1])))
                current, comma = current[comma + 1 :], -1
            if len(current) + len(unit) > MAX_TOKENS:
                done.append(Chunk(tuple(current)))
                current, comma = [], -1
            current += unit
    # nothing after the last BREAK is no chunk
    if current or not done:
        done.append(Chunk(tuple(current)))
    return done


def _at_words(units: Iterable[Unit]) -> list[Chunk]:
    """ComfyUI's cuts (comfy/sd1_clip.py): a word of 8 tokens or more may be cut, a shorter one begins a chunk."""
    done: list[Chunk] = []
    current: list[Token] = []
    for unit in units:
        rest = unit
        while len(current) + len(rest) > MAX_TOKENS:
            room = MAX_TOKENS - len(current) if len(unit) >= _LONG_WORD else 0
            done.append(Chunk((*current, *rest[:room])))
            current, rest = [], rest[room:]
        current += rest
    return [*done, Chunk(tuple(current))]
