"""The subcommands as the program sees them: light to list, complete in what they say."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from sdxl_cli import cli

HEAVY = [
    "torch",
    "transformers",
    "open_clip",
    "PIL",
    "numpy",
    "pyarrow",
    "safetensors",
    "einops",
    "rich.console",
]
NAMES = cli.command_names()


def leaves() -> list[str]:
    """Everything that can be run: ``generate``, ``eval images``."""
    found = []
    for name in NAMES:
        inner = getattr(cli.load_command(name), "SUBCOMMANDS", None)
        found += [f"{name} {each}" for each in inner] if inner else [name]
    return found


def built(path: str) -> Any:
    name, _, inner = path.partition(" ")
    command = cli.built(name)
    return command.commands[inner] if inner else command


@pytest.mark.parametrize("args", [["--help"], ["--version"], []])
def test_the_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\nfrom sdxl_cli import cli\n"
        f"assert cli.run({args}) == 0\nsys.exit(', '.join(set({HEAVY}) & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_command_has_a_panel_and_one_line_that_says_what_it_does(name: str) -> None:
    module = cli.load_command(name)
    assert isinstance(module.PANEL, str)
    assert module.PANEL in cli.PANELS, f"{module.PANEL} is a new heading: list it in cli.PANELS"
    summary = module.command.__doc__.strip().splitlines()[0]
    assert len(summary) <= 90
    assert summary.endswith(".")


@pytest.mark.parametrize("name", leaves())
def test_every_argument_and_option_is_documented(name: str) -> None:
    silent = [param.name for param in built(name).params if not getattr(param, "help", None)]
    assert not silent, f"{name}: no help on {', '.join(silent)}"


@pytest.mark.parametrize("name", [*leaves(), "eval"])
def test_the_help_of_a_command_can_be_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*name.split(), "--help"]) == 0
    assert f"sdxl {name}" in capsys.readouterr().out
