"""The program around the subcommands: help, version, and every way to fail as one line and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_cli import __version__, cli, commands
from sdxl_cli.errors import (
    FileError,
    Interrupted,
    MemoryLimitError,
    NetworkError,
    NumericError,
    SdxlError,
    UsageError,
    unknown,
)

COMMAND = '''
from typing import Annotated
import typer
PANEL = "Generate"

def command(
    how: Annotated[str, typer.Argument(help="How to fail.")],
    number: Annotated[int, typer.Option(help="A number.")] = 1,
) -> None:
    """Fail in the way asked for."""
    from sdxl_cli import errors

    class OutOfMemoryError(RuntimeError):
        """Named as torch's."""

    print("started")
    if how == "fine":
        return
    raise {
        "file": errors.FileError("a.safetensors: 3.1 of 6.9 GB are here;\\n  download it again"),
        "memory": MemoryError("no room"),
        "cuda": OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\\nmore"),
        "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "interrupt": KeyboardInterrupt(),
        "disk": PermissionError(13, "Permission denied", "out.png"),
        "defect": ZeroDivisionError("division by zero"),
    }[how]
'''

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subcommand ``fail-somehow`` beside the real ones."""
    (tmp_path / "fail_somehow.py").write_text(COMMAND, encoding="utf-8")
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "sdxl_cli.commands.fail_somehow", raising=False)
    monkeypatch.delenv("SDXL_DEBUG", raising=False)


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["fail-somehow", "file"], 3, "sdxl: a.safetensors: 3.1 of 6.9 GB are here; download it again\n"),
        (["fail-somehow", "memory"], 5, "(no room)\n"),
        (["fail-somehow", "cuda"], 5, "(CUDA out of memory. Tried to allocate 2 GiB)\n"),
        (["fail-somehow", "allocator"], 5, "sdxl: out of memory; ask for a smaller size"),
        (["fail-somehow", "disk"], 3, "sdxl: out.png: Permission denied\n"),
        (["fail-somehow"], 2, "sdxl: missing argument"),
        (["fail-somehow", "fine", "--number", "x"], 2, "sdxl: invalid value for '--number'"),
        (["fail-somehow", "fine", "--nmber", "1"], 2, "--number"),
        (["fail-somhow"], 2, "sdxl: unknown command 'fail-somhow'; did you mean fail-somehow"),
        (["--wrong"], 2, "sdxl: no such option: --wrong"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(
    args: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(args) == code
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("sdxl: ")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("failing")
def test_a_wrong_flag_says_which_help_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["fail-somehow", "fine", "--number", "x"]) == 2
    assert capsys.readouterr().err.endswith("; see sdxl fail-somehow --help\n")


@pytest.mark.usefixtures("failing")
def test_an_interrupted_run_exits_130() -> None:
    assert cli.run(["fail-somehow", "interrupt"]) == 130


@pytest.mark.usefixtures("failing")
def test_a_defect_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(["fail-somehow", "defect"])


@pytest.mark.usefixtures("failing")
def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDXL_DEBUG", "0")
    assert cli.run(["--debug", "fail-somehow", "file"]) == 3
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("sdxl: a.safetensors")


@pytest.mark.usefixtures("failing")
def test_help_lists_the_commands_under_their_panels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert "Generate:\n" in text
    assert "fail-somehow" in text
    assert "Fail in the way asked for." in text
    for code, meaning in cli.EXIT_CODES.items():
        assert f"{code} " in text
        assert meaning in text
    assert cli.run([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"sdxl {__version__}\n"


def test_every_kind_of_error_has_its_documented_exit_code() -> None:
    kinds = [SdxlError, UsageError, FileError, NumericError, MemoryLimitError, NetworkError, Interrupted]
    assert [kind.exit_code for kind in kinds] == [1, 2, 3, 4, 5, 6, 130]
    assert {0, *(kind.exit_code for kind in kinds)} == set(cli.EXIT_CODES)


def test_the_program_is_a_module_too_and_survives_a_closed_pipe() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    run = subprocess.run(
        [sys.executable, "-m", "sdxl_cli", "--help"], stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert run.stderr == b""


def test_an_unknown_name_is_told_with_the_nearest_or_with_all() -> None:
    assert str(unknown("sampler", "EULR", ["euler", "heun"])) == "unknown sampler 'EULR'; did you mean euler?"
    assert (
        str(unknown("sampler", "zzz", ["heun", "euler"])) == "unknown sampler 'zzz'; there are: euler, heun"
    )
    assert str(unknown("preset", "x", [])) == "unknown preset 'x'; there are none"
