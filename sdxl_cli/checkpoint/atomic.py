"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdxl_cli.errors import FileError, SdxlError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_write(path: Path | str, *, overwrite: bool = True) -> Iterator[Path]:
    """Write a file under a temporary name beside ``path``; it takes its place when the block ends well.

    The temporary name keeps the suffix, so that writers which choose a format by it still do. Missing folders are
    made. On an error or an interruption the temporary file is removed and ``path`` is as it was.

    Args:
        path: the file to be.
        overwrite: whether an existing file may be replaced. Without it two processes never both succeed.

    Yields:
        The path to write to.

    Raises:
        FileError: the file exists already (with ``overwrite=False``) or may not be written.
        SdxlError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not overwrite and path.exists():
            raise _taken(path)
        yield temporary
        _sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            _claim(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise SdxlError(
                f"{path} could not be written: the disk is full; free some space and try again"
            ) from error
        if error.filename in (str(temporary), str(path), str(path.parent)):
            raise FileError(f"{path} cannot be written: {error.strerror}") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _claim(temporary: Path, path: Path) -> None:
    """Move without ever replacing; a hard link fails when the name is taken, a rename would not."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError:  # a file system without hard links
        try:
            path.touch(exist_ok=False)
        except FileExistsError as error:
            raise _taken(path) from error
        temporary.replace(path)


def _taken(path: Path) -> FileError:
    return FileError(f"{path} exists already; choose another name or remove it")


def _sync(path: Path) -> None:
    """Ask the disk to keep what was written; folders cannot be asked on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
