"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
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
        sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            _claim(temporary, path)
        sync(path.parent)
    except OSError as error:
        told = _told(error, path, temporary)
        if told is error:
            raise
        raise told from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Fill a folder under a temporary name beside ``path``; it takes its place when the block ends well.

    Nothing is ever replaced. On an error or an interruption the temporary folder is removed.

    Args:
        path: the folder to be; its parents are made.

    Yields:
        The folder to fill.

    Raises:
        FileError: ``path`` exists already or may not be written.
        SdxlError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        if path.exists():
            raise _taken(path)
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            sync(file)
        if path.exists():
            raise _taken(path)
        temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _taken(path) from error
        told = _told(error, path, temporary)
        if told is error:
            raise
        raise told from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _told(error: OSError, path: Path, temporary: Path) -> OSError | SdxlError:
    """The error in words, when it is one about this path or the room on the disk."""
    if error.errno in _FULL:
        return SdxlError(f"{path} could not be written: the disk is full; free some space and try again")
    inside = str(error.filename).startswith(str(temporary))
    if inside or error.filename in (str(path), str(path.parent)):
        return FileError(f"{path} cannot be written: {error.strerror}")
    return error


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


def sync(path: Path) -> None:
    """Ask the disk to keep what was written; folders cannot be asked on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
