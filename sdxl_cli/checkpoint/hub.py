"""The local Hugging Face cache, read without the network and without huggingface_hub.

Layout: ``<cache>/models--ORG--NAME/refs/REVISION`` holds a commit, ``snapshots/COMMIT/`` its files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from sdxl_cli.checkpoint.released import RELEASED

SHORT_NAMES: dict[str, str] = {name: known.repo for name, known in RELEASED.items()}
"""What may be typed for the released models."""

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>[\w./-]+))?")


def parse_id(text: str) -> tuple[str, str | None, str | None] | None:
    """``org/name[@revision][/file]`` -> its three parts, or None when it is not one."""
    match = _HUB_ID.fullmatch(text)
    return (match["repo"], match["revision"], match["file"]) if match else None


def cache_folder() -> Path:
    """Where the cache is: ``HF_HUB_CACHE``, else ``HF_HOME``/hub, else below the user's cache folder."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    return user_cache() / "huggingface" / "hub"


def user_cache() -> Path:
    """``XDG_CACHE_HOME``, else ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def snapshots(repo: str, revision: str | None = None) -> list[Path]:
    """The copies of a repository in the cache: that of ``revision`` (default ``main``) first, then the newest.

    With a ``revision`` only its copy is returned. Empty when nothing is there.
    """
    return list(dict.fromkeys(_snapshots(home(repo), revision)))


def _snapshots(repository: Path, revision: str | None) -> Iterator[Path]:
    folder = repository / "snapshots"
    reference = repository / "refs" / (revision or "main")
    named = folder / (reference.read_text("utf-8").strip() if reference.is_file() else revision or "main")
    if named.is_dir():
        yield named
    if revision is None and folder.is_dir():
        yield from sorted(
            filter(Path.is_dir, folder.iterdir()), key=lambda path: path.stat().st_mtime, reverse=True
        )


def home(repo: str) -> Path:
    """The folder of a repository in the cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def partial_download(repo: str) -> Path | None:
    """The largest file of a repository that a download began and did not end; None without one."""
    files = (home(repo) / "blobs").glob("*.incomplete")
    return max(files, key=lambda path: path.stat().st_size, default=None)


def typed_name(what: str) -> str:
    """How a repository, or a file of one, is best typed: ``base`` for the released base."""
    return next((name for name, repo in SHORT_NAMES.items() if repo == what), what)


def is_offline() -> bool:
    """Whether the user forbids the network, in the way of the Hugging Face libraries."""
    wanted = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return wanted.upper() in ("1", "ON", "YES", "TRUE")


def blob_sha256(path: Path) -> str | None:
    """The sha256 of a large file of the cache, which is the name of the blob it links to; None for other files."""
    blob = path.resolve()
    is_hash = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if is_hash else None
