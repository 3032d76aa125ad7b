"""The console: results on stdout, the rest on stderr, bars only where there is a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdxl_cli import console
from sdxl_cli.console import Console


@dataclass(frozen=True)
class Result:
    path: Path
    loss: float
    sizes: tuple[int, ...]


def test_results_go_to_stdout_and_notes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Console()
    speaker.print_result("out/picture.png")
    speaker.note("using the bundled model")
    speaker.warn("the prompt is long")
    captured = capsys.readouterr()
    assert captured.out == "out/picture.png\n"
    assert captured.err == "using the bundled model\nwarning: the prompt is long\n"


def test_quiet_keeps_results_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Console(quiet=True)
    speaker.print_result("x")
    speaker.note("hidden")
    speaker.warn("shown")
    assert capsys.readouterr() == ("x\n", "warning: shown\n")


def test_json_is_the_only_thing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Console(as_json=True)
    speaker.print_result("x")
    speaker.table(["a"], [["b"]])
    speaker.json({"result": Result(Path("a.png"), float("nan"), (1, 2)), "names": {"b", "a"}})
    said = json.loads(capsys.readouterr().out)
    assert said == {"result": {"path": "a.png", "loss": None, "sizes": [1, 2]}, "names": ["a", "b"]}


def test_without_json_only_the_text_form_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Console().json({"a": 1})
    assert capsys.readouterr().out == ""


def test_arrays_and_their_scalars_have_a_json_form() -> None:
    import numpy as np

    assert console.to_jsonable({"a": np.arange(3), "b": np.float32(0.5)}) == {"a": [0, 1, 2], "b": 0.5}
    with pytest.raises(TypeError, match="no JSON form"):
        console.to_jsonable(object())


def test_a_table_in_a_pipe_is_aligned_text_that_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    Console().table(["name", "loss"], [["unet", 0.123456], [long, None]], title="Losses")
    title, head, first, second = capsys.readouterr().out.splitlines()
    assert title == "Losses"
    assert head.split() == ["name", "loss"]
    assert first.split() == ["unet", "0.1235"]
    assert second.split() == [long, "-"]
    assert len(head) == len(first)


def test_progress_without_a_terminal_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Console()
    assert list(speaker.progress(3, "counting")) == [0, 1, 2]
    assert list(speaker.progress(iter("ab"), "going", total=2)) == ["a", "b"]
    with speaker.bar("working", 2) as bar:
        bar.advance()
        bar.status("loss 1")
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_drawn_on_stderr_and_notes_go_through_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    speaker = Console()
    for _ in speaker.progress(2, "outer"):
        with speaker.bar("inner", 1) as bar:
            bar.advance()
        speaker.note("between [steps]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "outer" in captured.err
    assert captured.err.count("between [steps]") == 2
    speaker.note("after")
    assert capsys.readouterr().err == "after\n"


def test_results_under_a_bar_go_where_results_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a pipe, though rich would take what is printed to where its bars are."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    speaker = Console()
    for _ in speaker.progress(2, "steps"):
        speaker.print_result("a.png")
    captured = capsys.readouterr()
    assert captured.out == "a.png\na.png\n"
    assert "a.png" not in captured.err


def test_a_bar_that_fails_leaves_the_console_usable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    speaker = Console()
    with pytest.raises(RuntimeError), speaker.bar("working"):
        raise RuntimeError
    capsys.readouterr()
    speaker.warn("after")
    assert capsys.readouterr().err == "warning: after\n"


def test_speaking_into_pipes_does_not_import_rich() -> None:
    code = """
import sys
from sdxl_cli import console
c = console.configure(quiet=False, json=False)
list(c.progress(3, "x")); c.note("n"); c.warn("w"); c.print_result("r"); c.table(["a"], [[1]])
sys.exit("rich" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
