"""The learned embeddings a prompt may mention: which names there are, and the files behind them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_cli.errors import FileError, UsageError, unknown
from sdxl_cli.generation.chunks import reference

if TYPE_CHECKING:
    from sdxl_cli.checkpoint.embedding import Embedding

SUFFIXES = (".safetensors", ".pt", ".bin")
"""What embedding files are called."""
_MENTION = re.compile(r"embedding:([^\s,()\[\]:|]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Book:
    """Names and their files. A file is read when a prompt mentions its name, and then once."""

    files: Mapping[str, Path] = field(default_factory=dict)
    _read: dict[str, Embedding] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Embedding:
        """The embedding of a name that is in :attr:`files`.

        Raises:
            FileError: see :func:`sdxl_cli.checkpoint.embedding.read_embedding`.
        """
        # torch is not needed to read prompts without embeddings
        from sdxl_cli.checkpoint.embedding import read_embedding

        if name not in self._read:
            self._read[name] = read_embedding(self.files[name])
        return self._read[name]

    def mentioned(self, texts: Iterable[str], name: str, *, bare: bool) -> dict[str, int]:
        """The embeddings that texts mention, and how many vectors each has.

        Args:
            texts: pieces of a prompt.
            name: what the prompt is called in an error.
            bare: whether a name without ``embedding:`` is a mention.

        Raises:
            UsageError: there is no embedding of a name after ``embedding:``.
            FileError: see :func:`sdxl_cli.checkpoint.embedding.read_embedding`.
        """
        pattern, explicit = reference(self.files, bare=bare), reference(self.files, bare=False)
        by_name = {known.lower(): known for known in self.files}
        found: dict[str, int] = {}
        for text in texts:
            for mention in _MENTION.finditer(text):
                if explicit is None or not explicit.match(text, mention.start()):
                    raise _no_embedding(mention[1], name, self.files)
            for match in pattern.finditer(text) if pattern else ():
                known = by_name[match["name"].lower()]
                found[known] = self[known].count
        return found


def open_book(specs: Sequence[str], folder: str | None) -> Book:
    """The embeddings of ``--embedding FILE[:NAME]`` and of all files in ``--embeddings-dir``; nothing is read yet.

    Raises:
        FileError: a file or the folder does not exist.
        UsageError: two files have one name, or a name cannot stand in a prompt.
    """
    files = _in_folder(Path(folder)) if folder else {}
    given: dict[str, Path] = {}
    for spec in specs:
        path, name = split_spec(spec)
        if not path.is_file():
            raise FileError(f"--embedding {path}: no such file")
        if not name or re.search(r"[()\[\]:|\\]", name):
            raise UsageError(
                f"--embedding {spec}: {name!r} cannot stand in a prompt; give another name: {path}:NAME"
            )
        if name.lower() in (other.lower() for other in given):
            raise UsageError(f"--embedding {spec}: another one is called {name} already; give {path}:NAME")
        given[name] = path
    taken = {name.lower() for name in given}
    return Book({name: path for name, path in files.items() if name.lower() not in taken} | given)


def split_spec(spec: str) -> tuple[Path, str]:
    """``FILE[:NAME]`` to path and name; without one, the file's own without its suffix."""
    path = Path(spec).expanduser()
    head, colon, name = spec.rpartition(":")
    if path.is_file() or not colon or not head or "/" in name or name.endswith(SUFFIXES):
        return path, path.stem
    return Path(head).expanduser(), name


def sha256(path: Path) -> str:
    """Hash of an embedding file in 64 hexadecimal digits, for a picture's record."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _in_folder(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileError(f"--embeddings-dir {folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.expanduser().rglob("*")):
        if path.suffix in SUFFIXES and path.is_file() and not re.search(r"[()\[\]:|\\]", path.stem):
            found.setdefault(path.stem, path)
    return found


def _no_embedding(asked: str, name: str, files: Mapping[str, Path]) -> UsageError:
    if not files:
        return UsageError(
            f"{name}: embedding:{asked}: there is no such embedding; give --embedding FILE:{asked}"
        )
    return UsageError(f"{name}: {unknown('embedding', asked, files)}")
