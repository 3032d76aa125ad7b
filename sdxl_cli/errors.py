"""What can go wrong, and the exit code each kind ends the program with.

Every error a user can cause is an :class:`SdxlError`. Its text is one line: which file or flag, what is
wrong with it, and what to do. ``sdxl_cli.cli`` prints that line and exits with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SdxlError(Exception):
    """Something failed at run time for a reason the user can act on."""

    exit_code = 1


class UsageError(SdxlError):
    """A flag, preset or configuration value is wrong."""

    exit_code = 2


class FileError(SdxlError):
    """A file is missing, damaged, or not the kind of file it should be."""

    exit_code = 3


class NumericError(SdxlError):
    """A stage produced NaN or infinity."""

    exit_code = 4


class MemoryLimitError(SdxlError):
    """The work does not fit in memory, after every fallback."""

    exit_code = 5


class NetworkError(SdxlError):
    """The network would be needed and is not allowed."""

    exit_code = 6


class Interrupted(SdxlError):
    """The user stopped the run; what could be saved is saved."""

    exit_code = 130


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in a table: says the nearest names, or all of them when none is near.

    ``what`` is the kind of thing in a word or two (``"sampler"``), ``known`` every name allowed.
    """
    names = sorted(set(known))
    folded = {candidate.lower(): candidate for candidate in names}
    near = [folded[match] for match in get_close_matches(name.lower(), list(folded), n=3, cutoff=0.6)]
    if near:
        return UsageError(f"unknown {what} {name!r}; did you mean {' or '.join(near)}?")
    if names:
        return UsageError(f"unknown {what} {name!r}; there are: {', '.join(names)}")
    return UsageError(f"unknown {what} {name!r}; there are none")
