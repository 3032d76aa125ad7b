"""The ``sdxl`` program: finds the subcommands, and turns what goes wrong into one line and an exit code.

A subcommand is a module of ``sdxl_cli.commands`` with ``PANEL`` (its heading in the help) and ``command`` (a
function with Typer annotations); where it has subcommands of its own, they are in ``SUBCOMMANDS``, by name. Only the
module of the subcommand asked for is imported; the help lists them all, which is why none of them may import anything
heavy at the top.
"""

from __future__ import annotations

import os
import pkgutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command as build_command

from sdxl_cli import __version__, commands
from sdxl_cli.errors import FileError, Interrupted, MemoryLimitError, SdxlError, UsageError, unknown

EXIT_CODES = {
    0: "done",
    1: "failed",
    2: "a flag, preset or configuration value is wrong",
    3: "a file is missing, damaged or of the wrong kind",
    4: "a stage produced NaN or infinite numbers",
    5: "out of memory after every fallback",
    6: "the network would be needed and is not allowed",
    130: "interrupted; what could be saved is saved",
}
"""What the program's exit status means."""

PANELS = ("Generate", "Models", "Train", "Data", "Inspect")
"""Headings of the help, in the order a newcomer meets them; others follow."""


def command_names() -> list[str]:
    """The subcommands, as typed: file names with ``-`` for ``_``. Files that begin with ``_`` are helpers."""
    modules = [info.name for info in pkgutil.iter_modules(commands.__path__)]
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def load_command(name: str) -> ModuleType:
    """Import the module behind the subcommand ``name``."""
    return import_module(f"{commands.__name__}.{name.replace('-', '_')}")


def built(name: str) -> Any:
    """The subcommand ``name`` as click runs it, with those it has itself."""
    module = load_command(name)
    app = typer.Typer(add_completion=False)
    if not hasattr(module, "SUBCOMMANDS"):
        app.command(name)(module.command)
        return build_command(app)
    app.callback()(module.command)
    for inner, function in module.SUBCOMMANDS.items():
        app.command(inner)(function)
    return build_command(app)


class CommandGroup(TyperGroup):
    """The subcommands, each built when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all subcommands."""
        return command_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or a usage error with the nearest names."""
        if cmd_name.startswith("-"):
            return None  # an option in the wrong place: the parser says so
        if cmd_name not in command_names():
            raise unknown("command", cmd_name, command_names())
        return built(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The page of ``sdxl --help``, as plain text: rich would cost more time than all the rest of it."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        options = [record for option in self.get_params(ctx) if (record := option.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(options)
        for panel, rows in _panels().items():
            with formatter.section(panel):
                formatter.write_dl(rows)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


def _panels() -> dict[str, list[tuple[str, str]]]:
    """Panel -> (command, first line of its docstring)."""
    panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
    for name in command_names():
        module = load_command(name)
        summary = (module.command.__doc__ or "").strip().splitlines()
        panels.setdefault(module.PANEL, []).append((name, summary[0] if summary else ""))
    return {panel: rows for panel, rows in panels.items() if rows}


app = typer.Typer(
    cls=CommandGroup,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sdxl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show Python's traceback when something fails (or SDXL_DEBUG=1).")
    ] = False,
) -> None:
    """Stable Diffusion XL: generate and refine pictures, train the model, look inside it."""
    if debug:
        os.environ["SDXL_DEBUG"] = "1"
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main(args: Sequence[str] | None = None) -> None:
    """Run the program on ``args`` (the command line by default) and exit with one of ``EXIT_CODES``."""
    try:
        code = run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader of our pipe is gone (`| head`); Python must not complain about it while it shuts down
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    raise SystemExit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; errors are told on stderr in one line."""
    try:
        result = build_command(app).main(args=args, prog_name="sdxl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if not (told := _told(error)):
            raise
        if os.environ.get("SDXL_DEBUG") == "1":
            traceback.print_exception(error)
        print(f"sdxl: {_one_line(str(told))}", file=sys.stderr)
        return told.exit_code


def _told(error: BaseException) -> SdxlError | None:
    """The error as the user is told it; ``None`` for a defect of the program, whose traceback is wanted."""
    if isinstance(error, SdxlError):
        return error
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Interrupted("interrupted")
    if isinstance(error, typer.TyperException):
        return _usage(error)
    if _is_out_of_memory(error):
        detail = str(error).partition("\n")[0]
        return MemoryLimitError(
            f"out of memory; ask for a smaller size or batch, or a narrower dtype ({detail})"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return FileError(f"{error.filename}: {error.strerror}")
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's or torch's CPU allocator's; told by name, as torch may not be imported at all."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _usage(error: typer.TyperException) -> UsageError:
    ctx = getattr(error, "ctx", None)
    text = error.format_message().rstrip(".")
    return UsageError(f"{text[:1].lower()}{text[1:]}; see {ctx.command_path} --help" if ctx else text)


def _one_line(text: str) -> str:
    return " ".join(textwrap.dedent(text).split())
