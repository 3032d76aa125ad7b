"""Lines of prompt files: kohya's letters, our flags, JSON."""

from __future__ import annotations

import pytest

from sdxl_cli.commands._working import aliases
from sdxl_cli.commands.generate import command
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.batchfile import LineReader, read_lines
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.values import changed

READER = LineReader(GenerateRequest, aliases(command, GenerateRequest))


def changes(text: str) -> dict[str, object]:
    line = READER.read(text, "p:1")
    assert line is not None
    return dict(line.changes)


def test_a_line_of_kohyas_documentation() -> None:
    """The example of sd-scripts' page on generating: letters, values without quotes."""
    assert changes(
        "masterpiece, best quality, 1girl, in white shirts --n low quality, bad anatomy, (worst:1.2) "
        "--w 768 --h 1024 --d 1 --l 7.5 --s 28"
    ) == {
        "prompt": "masterpiece, best quality, 1girl, in white shirts",
        "negative_prompt": "low quality, bad anatomy, (worst:1.2)",
        "width": 768,
        "height": 1024,
        "seed": 1,
        "cfg_scale": 7.5,
        "steps": 28,
    }


def test_sizes_in_halves_become_one() -> None:
    found = changes("a cat --ow 1024 --oh 768 --ct 8 --cl 16")
    assert found == {"prompt": "a cat", "original_size": "1024x768", "crop_top_left": "8,16"}
    framing = changed(GenerateRequest(prompt=""), found, "p").framing((64, 64), buckets=(), multiple=8)
    assert (framing.original_size, framing.crop_top_left) == ((768, 1024), (8, 16))
    with pytest.raises(UsageError, match="p:1: --ow and --oh belong together"):
        READER.read("a cat --ow 3", "p:1")


def test_every_flag_of_the_command_is_understood_with_its_aliases() -> None:
    assert changes('a cat --guidance-scale 3 --neg "a dog" --num-inference-steps=9 --ckpt x.safetensors') == {
        "prompt": "a cat",
        "cfg_scale": 3.0,
        "negative_prompt": "a dog",
        "steps": 9,
        "model": "x.safetensors",
    }


def test_dashes_that_are_no_flag_belong_to_the_prompt() -> None:
    assert changes("a cat -- by the sea -n --s 3") == {"prompt": "a cat -- by the sea -n", "steps": 3}
    assert changes("well-known high--contrast art") == {"prompt": "well-known high--contrast art"}


def test_json_takes_fields_and_flags() -> None:
    assert changes('{"prompt": "a --s 3 cat", "cfg-scale": 3, "negative_prompt": null}') == {
        "prompt": "a --s 3 cat",
        "cfg_scale": 3,
        "negative_prompt": None,
    }
    with pytest.raises(UsageError, match="p:1: cfg-scale is given twice"):
        READER.read('{"cfg_scale": 3, "guidance-scale": 3}', "p:1")
    line = READER.read('{"prompt": "x", "output": "a/b.png"}', "p:1")
    assert line is not None
    assert (line.output, dict(line.changes)) == ("a/b.png", {"prompt": "x"})


def test_a_wildcard_is_no_json() -> None:
    assert changes("{red|blue} cat") == {"prompt": "{red|blue} cat"}


def test_a_size_replaces_width_and_height() -> None:
    before = GenerateRequest(prompt="x", width=96, height=64)
    after = changed(before, changes("y --size 72x80"), "p")
    assert (after.size, after.width, after.height) == ("72x80", None, None)


def test_comments_and_empty_lines_are_skipped_but_counted() -> None:
    lines = read_lines(["\ufeff# mine\n", "\n", "a cat\n", "  a dog --s 3\n"], "p.txt", READER)
    assert [(line.where, line.changes["prompt"]) for line in lines] == [
        ("p.txt:3", "a cat"),
        ("p.txt:4", "a dog"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a cat --stepps 3", "p.txt:2: unknown setting 'stepps'; did you mean steps"),
        ("a cat --s many", "p.txt:2: steps: expected a whole number, got 'many'"),
        ("a cat --s", "p.txt:2: --s needs a value"),
        ("a cat --s 3 --steps 4", "p.txt:2: --steps is given twice"),
        ('{"prompt": "x"', "p.txt:2: is not one line of JSON"),
        ('{"prompt": "x", "seeed": 1}', "p.txt:2: unknown setting 'seeed'; did you mean seed"),
        ('{"output": 3}', "p.txt:2: output: expected a path, got 3"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(text: str, words: str) -> None:
    with pytest.raises(UsageError) as told:
        read_lines(["a cat", text], "p.txt", READER)
    assert words in str(told.value)


def test_all_wrong_lines_are_told_at_once() -> None:
    with pytest.raises(UsageError, match=r"p:1: .*; p:3: ") as told:
        read_lines(["x --foo", "fine", "x --s y"], "p", READER)
    assert "p:2" not in str(told.value)
    with pytest.raises(UsageError, match="p: has no prompts"):
        read_lines(["", "# nothing"], "p", READER)
