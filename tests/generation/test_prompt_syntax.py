"""How prompts are read, against what the two front ends say of themselves."""

from __future__ import annotations

import math
import random

import pytest

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.prompt_syntax import Span, Syntax, parse


def pairs(text: str, syntax: Syntax = "a1111") -> list[list[tuple[str, float]]]:
    return [[(span.text, round(span.weight, 6)) for span in section] for section in parse(text, syntax)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the examples in the documentation of A1111's own parser
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        # its rules at the edges
        ("", [("", 1.0)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("a :1.3) b", [("a :1.3) b", 1.0)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:-.5)", [("a", -0.5)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(16:9:1.2)", [("16:9", 1.2)]),
        ("[[a]", [("a", round(1 / 1.21, 6))]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", round(1 / 1.1, 6))]),
        (r"C:\\dir \[x\]", [(r"C:\dir [x]", 1.0)]),
        ("a\\", [("a", 1.0)]),
    ],
)
def test_a1111(text: str, expected: list[tuple[str, float]]) -> None:
    assert pairs(text) == [expected]


def test_a1111_begins_a_section_at_break() -> None:
    assert pairs("a BREAK b\nBREAK\nBREAK c") == [[("a", 1.0)], [("b", 1.0)], [("", 1.0)], [("c", 1.0)]]
    assert pairs("BREAK a BREAK") == [[("", 1.0)], [("a", 1.0)], [("", 1.0)]]
    assert pairs("BREAKFAST, break, a_BREAK") == [[("BREAKFAST, break, a_BREAK", 1.0)]]
    assert pairs("(a BREAK b:1.2)") == [[("a", 1.2)], [("b", 1.2)]]


@pytest.mark.parametrize(
    "text",
    [
        "[cat:dog:0.5]",
        "a [cat:dog:10] b",
        "[cat:0.5]",
        "[cat::.5]",
        "[(cat:1.2):dog: 3 ]",
        "[cat|dog]",
        "([a|b])",
    ],
)
def test_a_prompt_that_changes_between_steps_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="changes the prompt between steps") as caught:
        parse(text, "a1111", "negative prompt")
    assert str(caught.value).startswith("negative prompt: [")
    escaped = text.replace("[", r"\[").replace("]", r"\]")
    assert "".join(span.text for span in parse(escaped, "a1111")[0]).count("[") == 1
    assert parse(text, "raw") == ((Span(text),),)


def test_and_is_refused_where_a1111_would_compose() -> None:
    with pytest.raises(UsageError, match="AND in capitals"):
        parse("a cat AND a dog", "a1111")
    assert parse("a cat AND a dog", "a1111", composes=False) == ((Span("a cat AND a dog"),),)
    for text in ("salt and pepper", "LAND", "BANDANA"):
        assert parse(text, "a1111") == ((Span(text),),)
    for syntax in ("comfy", "raw"):
        assert parse("a AND b", syntax) == ((Span("a AND b"),),)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (b) c", [("a ", 1.0), ("b", 1.1), (" c", 1.0)]),
        # an inner number is the weight, whatever is around it; without one the outer weight is multiplied
        ("((b:1.3) c:0.5)", [("b", 1.3), (" c", 0.5)]),
        ("((b) c:0.5)", [("b", 0.55), (" c", 0.5)]),
        ("((b))", [("b", 1.21)]),
        ("[b] BREAK c", [("[b] BREAK c", 1.0)]),
        (r"\(b\) (c \(d\):1.2)", [("(b) ", 1.0), ("c (d)", 1.2)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("(a:nan) (a:1e1)", [("a:nan", 1.1), (" ", 1.0), ("a", 10.0)]),
        ("a (b", [("a ", 1.0), ("(b", 1.0)]),
        ("a) (b) (c)", [("a) (b) (c)", 1.0)]),
        ("", []),
    ],
)
def test_comfy(text: str, expected: list[tuple[str, float]]) -> None:
    assert pairs(text, "comfy") == [expected]


def test_raw_is_the_text() -> None:
    text = r"(a:1.2) [b] BREAK \(c\)"
    assert parse(text, "raw") == ((Span(text),),)


def test_weights_multiply_in_a1111_and_the_innermost_number_wins_in_comfy() -> None:
    """Random trees, against the sum of what is on the way down to each word."""
    generator = random.Random(1)

    def tree(depth: int, a1111: float, comfy: float, found: list[tuple[str, float, float]]) -> str:
        word = f"w{len(found)}"
        if depth == 0 or generator.random() < 0.3:
            found.append((word, a1111, comfy))
            return word
        number = generator.choice([None, 0.5, 1.25, 2.0])
        factor = 1.1 if number is None else number
        inner = [
            tree(depth - 1, a1111 * factor, comfy * 1.1 if number is None else number, found)
            for _ in range(generator.randint(1, 3))
        ]
        return f"({' '.join(inner)}{'' if number is None else f':{number}'})"

    for _ in range(50):
        found: list[tuple[str, float, float]] = []
        text = tree(4, 1.0, 1.0, found)
        for syntax, column in (("a1111", 1), ("comfy", 2)):
            (spans,) = parse(text, syntax)  # type: ignore[arg-type]
            weights = {word: span.weight for span in spans for word in span.text.split()}
            assert weights.keys() == {word for word, *_ in found}, text
            for row in found:
                assert math.isclose(weights[row[0]], row[column], rel_tol=1e-9), (syntax, text)
