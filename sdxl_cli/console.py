"""The one console: results go to stdout, everything said about them to stderr.

``get()`` is the console of the process; a command calls ``configure`` once with its ``--quiet`` and
``--json`` flags. Rich is imported only when a terminal is there to show it to.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress
    from rich.text import Text

T = TypeVar("T")
Cell = str | int | float | None


class Bar:
    """A progress bar, or nothing at all when there is no terminal to draw it on."""

    def __init__(self, progress: Progress | None, description: str, total: int | None) -> None:
        """``total`` is the number of steps, ``None`` when nobody knows."""
        self._progress = progress
        self._task = progress.add_task(description, total=total, status="") if progress else None

    def advance(self, steps: int = 1) -> None:
        """Move on by ``steps``."""
        if self._progress and self._task is not None:
            self._progress.advance(self._task, steps)

    def status(self, text: str) -> None:
        """Show ``text`` (a loss, a file name) at the end of the bar."""
        if self._progress and self._task is not None:
            self._progress.update(self._task, status=text)

    def remove(self) -> None:
        """Take the bar off the screen."""
        if self._progress and self._task is not None:
            self._progress.remove_task(self._task)


class Console:
    """Where the program speaks. ``quiet`` hides notes and bars; ``as_json`` makes stdout one JSON text."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        """Nothing is opened or imported here; streams are looked up when something is said."""
        self.quiet = quiet
        self.as_json = as_json
        self.muted = False
        """Nothing at all is said: another process of the run speaks."""
        self._live: Progress | None = None
        self._picture: Text | None = None

    def print_result(self, text: str) -> None:
        """One result (a path, a number) as a line on stdout. Silent with ``--json``; see :meth:`json`."""
        if not self.as_json and not self.muted:
            print(text, file=sys.stdout, flush=True)

    def json(self, value: object) -> None:
        """The result as one JSON document on stdout. Silent without ``--json``: commands give both forms."""
        if self.as_json and not self.muted:
            print(
                json.dumps(to_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False),
                file=sys.stdout,
                flush=True,
            )

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, title: str | None = None
    ) -> None:
        """Rows as a table on stdout; numbers right-aligned. Silent with ``--json``."""
        if self.as_json or self.muted:
            return
        body = list(rows)
        if sys.stdout.isatty():
            _rich_table(columns, body, title)
        else:
            print(plain_table(columns, body, title=title), file=sys.stdout, flush=True)

    def note(self, text: str) -> None:
        """Something worth knowing, on stderr; hidden by ``--quiet``."""
        if not self.quiet:
            self._say(text)

    def warn(self, text: str) -> None:
        """Something the user may want to act on, on stderr; shown with ``--quiet`` too."""
        self._say(f"warning: {text}")

    @property
    def shows_progress(self) -> bool:
        """Whether bars are drawn: stderr is a terminal and ``--quiet`` was not given."""
        return not self.quiet and not self.muted and sys.stderr.isatty()

    @contextmanager
    def bar(self, description: str, total: int | None = None) -> Iterator[Bar]:
        """A bar on stderr that the caller advances; bars opened inside it stack below and go when done."""
        if not self.shows_progress:
            yield Bar(None, description, total)
        elif self._live is not None:
            inner = Bar(self._live, description, total)
            try:
                yield inner
            finally:
                inner.remove()
        else:
            with _rich_progress(lambda: self._picture) as self._live:
                try:
                    yield Bar(self._live, description, total)
                finally:
                    self._live = self._picture = None

    @overload
    def progress(self, items: int, description: str, *, total: int | None = None) -> Iterator[int]: ...
    @overload
    def progress(self, items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]: ...
    def progress(
        self, items: Iterable[Any] | int, description: str, *, total: int | None = None
    ) -> Iterator[Any]:
        """Go through ``items`` (or count up to a number) with a bar on stderr.

        ``total`` is needed only for iterables without a length; a bar without it shows no remaining time.
        """
        iterable = range(items) if isinstance(items, int) else items
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        with self.bar(description, total) as bar:
            for item in iterable:
                yield item
                bar.advance()

    def show(self, pixels: Sequence[Sequence[tuple[int, int, int]]]) -> None:
        """A picture under the bar, in place of the one before; goes when the bar does.

        Args:
            pixels: rows of (red, green, blue), 0 … 255; two rows share a line of the terminal.
        """
        if self._live is not None:
            self._picture = half_blocks(pixels)
            self._live.refresh()

    def json_line(self, value: object) -> None:
        """One of several results as JSON on a line of its own, for programs that read while we write."""
        if self.as_json and not self.muted:
            print(
                json.dumps(to_jsonable(value), ensure_ascii=False, allow_nan=False),
                file=sys.stdout,
                flush=True,
            )

    def _say(self, text: str) -> None:
        if self.muted:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


_console = Console()


def get() -> Console:
    """The console of this process."""
    return _console


def configure(*, quiet: bool = False, json: bool = False) -> Console:
    """Set what ``--quiet`` and ``--json`` ask for on the console of this process, and return it."""
    _console.quiet = quiet
    _console.as_json = json
    return _console


def to_jsonable(value: object) -> Any:
    """``value`` in terms of dict, list, str, number, bool and None.

    Takes dataclasses, paths, sets, tuples and anything with ``tolist()`` (arrays and their scalars). JSON has
    no NaN and no infinity: both become ``null``.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [to_jsonable(item) for item in sorted(value)]
    if isinstance(value, Iterable) and not hasattr(value, "tolist"):
        return [to_jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return to_jsonable(value.tolist())
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, title: str | None = None) -> str:
    """The table as text for pipes and files: columns two spaces apart, nothing cut off."""
    cells = [list(columns)] + [[format_cell(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    right = _numeric_columns(columns, rows)
    lines = [
        "  ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([title, *lines] if title else lines)


def format_cell(cell: Cell) -> str:
    """A table cell as text: four significant digits for floats, ``-`` for nothing."""
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _numeric_columns(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[bool]:
    kinds = [[row[i] for row in rows if row[i] is not None] for i in range(len(columns))]
    return [bool(kind) and all(isinstance(cell, int | float) for cell in kind) for kind in kinds]


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name, right in zip(columns, _numeric_columns(columns, rows), strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_cell(cell)) for cell in row))
    _rich_console(stderr=False).print(table)


def _rich_console(*, stderr: bool) -> RichConsole:
    from rich.console import Console as RichConsole

    return RichConsole(stderr=stderr, highlight=False, markup=False)


def half_blocks(pixels: Sequence[Sequence[tuple[int, int, int]]]) -> Text:
    """Rows of (red, green, blue) as text: the upper half of a character is one row, the lower half the next."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    text = Text(no_wrap=True)
    for top in range(0, len(pixels), 2):
        below = pixels[top + 1] if top + 1 < len(pixels) else None
        for x, upper in enumerate(pixels[top]):
            lower = Color.from_rgb(*below[x]) if below is not None else None
            text.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=lower))
        text.append("\n")
    return text


def _rich_progress(below: Callable[[], Text | None]) -> Progress:
    """The bars, with whatever ``below`` gives under them."""
    from rich.console import Group, RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Screen(Progress):
        def get_renderable(self) -> RenderableType:
            bars, picture = super().get_renderable(), below()
            return bars if picture is None else Group(bars, picture)

    return Screen(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=_rich_console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # results that go to a pipe or a file stay there
    )
