"""Where long prompts are cut, and that nothing is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sdxl_cli.generation.chunks import COMMA, Chunk, Vector, chunks
from sdxl_cli.generation.prompt import PAD_BIG_G, PAD_CLIP_L, Tokenizer
from sdxl_cli.generation.prompt_syntax import Syntax, parse

TOKENIZER = Tokenizer.default()
A, B = TOKENIZER.encode("a b")


def cut(text: str, syntax: Syntax = "a1111", **embeddings: int) -> list[Chunk]:
    return chunks(parse(text, syntax), syntax, TOKENIZER, embeddings, bare=syntax != "comfy")


def sizes(text: str, syntax: Syntax = "a1111", **embeddings: int) -> list[int]:
    return [len(chunk.tokens) for chunk in cut(text, syntax, **embeddings)]


def test_a_comma_is_the_token_that_ends_a_chunk() -> None:
    assert TOKENIZER.vocabulary[",</w>"] == COMMA


def test_a_short_prompt_is_one_chunk_with_the_rows_of_the_tokenizer() -> None:
    for text in ("", "a red guitar", "a " * 75):
        for syntax in ("a1111", "comfy", "raw"):
            (chunk,) = cut(text, syntax)  # type: ignore[arg-type]
            for padding in (PAD_CLIP_L, PAD_BIG_G):
                assert chunk.row(padding) == TOKENIZER.row(text, padding)
            assert chunk.weights() == [1.0] * 77


def test_weights_stand_at_their_tokens() -> None:
    (chunk,) = cut("a (b:1.5) a")
    assert chunk.row(0)[:5] == [49406, A, B, A, 49407]
    assert chunk.weights()[:6] == [1, 1, 1.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a " * 76, [75, 1]),
        # the last comma has 19 tokens after it when the chunk is full: they move to the next
        ("a " * 55 + ", " + "b " * 25, [56, 25]),
        # with 20 after it, it is too far away
        ("a " * 54 + ", " + "b " * 25, [75, 5]),
        # a comma that comes when the chunk is full begins the next one and moves nothing
        ("a " * 60 + ", " + "b " * 14 + ", b", [75, 2]),
        # as the very last token of a full chunk, nothing has to move
        ("a " * 74 + ", b", [75, 1]),
        # the comma of an earlier chunk is forgotten
        ("a " * 70 + ", " + "b " * 80, [71, 75, 5]),
        ("a, " * 40, [75, 5]),
        ("a BREAK b", [1, 1]),
        ("a BREAK BREAK b BREAK", [1, 0, 1]),
        ("BREAK a", [0, 1]),
        ("a " * 75 + "BREAK b", [75, 1]),
        ("a " * 76 + "BREAK b", [75, 1, 1]),
    ],
)
def test_a1111_cuts_at_a_comma_among_the_last_twenty(text: str, expected: list[int]) -> None:
    assert sizes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a " * 76, [75, 1]),
        # commas and BREAK mean nothing
        ("a " * 55 + ", " + "b " * 25, [75, 6]),
        ("a BREAK b", [3]),
        # 7 tokens between spaces stay together, 8 do not
        ("a " * 70 + "b,b,b,b", [70, 7]),
        ("a " * 70 + "b,b,b,b,", [75, 3]),
        ("a " * 75 + "b,b,b,b,", [75, 8]),
        ("b," * 80, [75, 75, 10]),
    ],
)
def test_comfy_cuts_between_words(text: str, expected: list[int]) -> None:
    assert sizes(text, "comfy") == expected


def test_nothing_is_lost_added_or_exchanged() -> None:
    generator = random.Random(0)
    for _ in range(200):
        words = generator.choices(
            ["red", ",", "guitar", "tables,", "b,b,b,b,b", "2024"], k=generator.randrange(300)
        )
        text = " ".join(words)
        for syntax in ("a1111", "comfy", "raw"):
            read = cut(text, syntax)  # type: ignore[arg-type]
            assert [token.id for chunk in read for token in chunk.tokens] == TOKENIZER.encode(text)
            assert max(len(chunk.tokens) for chunk in read) <= 75


def test_learned_embeddings_stand_in_for_their_names() -> None:
    (chunk,) = cut("a (style:1.3), b", style=3)
    expected = [None, Vector("style", 0), Vector("style", 1), Vector("style", 2), None, None]
    assert [token.vector for token in chunk.tokens] == expected
    assert [position for position, _ in chunk.vectors()] == [2, 3, 4]
    assert chunk.weights()[1:6] == [1, 1.3, 1.3, 1.3, 1]


@pytest.mark.parametrize(
    ("text", "syntax", "count"),
    [
        ("Style", "a1111", 1),
        ("(embedding:style:1.2)", "a1111", 1),
        ("embedding:style", "comfy", 1),
        ("(embedding:Style.safetensors:1.2)", "comfy", 1),
        ("style", "comfy", 0),
        ("style, style", "raw", 2),
        ("styles my-style style-2 my_style lifestyle", "a1111", 0),
        ("style2", "a1111", 0),
    ],
)
def test_where_a_name_is_a_mention(text: str, syntax: Any, count: int) -> None:
    assert sum(1 for chunk in cut(text, syntax, style=1) for _ in chunk.vectors()) == count


def test_the_longest_name_wins() -> None:
    (chunk,) = cut("style x", **{"style": 1, "style x": 2})
    assert [vector.name for _, vector in chunk.vectors()] == ["style x"] * 2


def test_vectors_of_an_embedding_stay_together() -> None:
    assert sizes("a " * 70 + "style b", style=6) == [70, 7]
    # ComfyUI keeps fewer than 8 together
    assert sizes("a " * 70 + "embedding:style b", "comfy", style=6) == [70, 7]
    assert sizes("a " * 70 + "embedding:style b", "comfy", style=9) == [75, 5]


def test_vectors_move_with_the_words_after_a_comma() -> None:
    first, second = cut("a " * 60 + ", style " + "b " * 13 + "b b", style=2)
    assert (len(first.tokens), len(second.tokens)) == (61, 17)
    assert [position for position, _ in second.vectors()] == [1, 2]
    assert not list(first.vectors())
