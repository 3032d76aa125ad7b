"""Files from the Hugging Face hub into its local cache: the only place in this program that uses the network.

huggingface_hub says what a file is and fetches it; since its version 1 a download that stops begins again from
nothing, so the part that is here is kept beside the cache's blobs, the rest is asked for, and the whole is put
into the cache only when its hash is right. The cache is that of every other program.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_cli import console as consoles
from sdxl_cli.checkpoint import hub
from sdxl_cli.checkpoint.diffusers_folder import INDEX
from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.checkpoint.released import RELEASED
from sdxl_cli.checkpoint.stream import require_room
from sdxl_cli.errors import FileError, NetworkError, SdxlError, UsageError

_CHUNK = 1 << 24
"""Bytes hashed at a time."""
_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_TEXTS = (".json", ".txt", ".model")
_FOLDERS = (
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "socket", "ssl")
"""Packages whose errors mean that the hub was not reached; huggingface_hub has changed from one to the next."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file of the hub."""

    repo: str
    file: str
    revision: str
    """Branch, tag or commit."""
    sha256: str | None = None
    """Known beforehand; None trusts what the hub says."""


@dataclass(frozen=True, slots=True)
class _Remote:
    """What the hub says of a file."""

    url: str
    size: int
    etag: str
    """sha256 of large files, git's sha1 of small ones."""


def choose(name: str, revision: str | None, variant: str | None) -> list[Wanted]:
    """Which files a name stands for.

    Args:
        name: ``base``, ``refiner``, ``vae``, ``org/name/file`` or ``org/name``: of the last one the single file at
            its top, else its diffusers folder.
        revision: branch, tag or commit; default ``main``. It also tells that another file than the released one
            is meant.
        variant: takes the diffusers folder instead of the single file, in this precision: ``fp16``.

    Raises:
        UsageError: it is no such name.
        FileError: the repository has not got a model, or several.
        NetworkError, SdxlError: the hub may not, or cannot, be asked.
    """
    known = RELEASED.get(name)
    if known is not None and variant is None:
        return [Wanted(known.repo, known.file, revision or "main", None if revision else known.sha256)]
    parsed = hub.parse_id(known.repo if known else name)
    if parsed is None:
        raise UsageError(f"{name!r} is no hub id; give {', '.join(RELEASED)}, org/name or org/name/file")
    repo, inside, file = parsed
    revision = revision or inside or "main"
    files = [file] if file else _model_files(repo, _listed(repo, revision), variant)
    return [Wanted(repo, file, revision) for file in files]


def fetch(wanted: Wanted) -> Path:
    """Download a file, or what is missing of it, check its hash, and say where it is.

    Raises:
        NetworkError: the network is not allowed and the file is not in the cache.
        FileError: the hub has no such file, or another one than was released, or what came is damaged.
        SdxlError: the hub cannot be reached, or the disk has not enough room.
    """
    if hub.is_offline():
        return _from_cache(wanted)
    with _told(wanted.repo, wanted.file):
        remote = _remote(wanted)
    stated = remote.etag if _SHA256.fullmatch(remote.etag) else None
    if wanted.sha256 and stated and stated != wanted.sha256:
        raise FileError(
            f"{wanted.repo}/{wanted.file} on the hub is not the released file (sha256 {stated[:10]}… instead of "
            f"{wanted.sha256[:10]}…); give --revision main to take it all the same"
        )
    blob = hub.home(wanted.repo) / "blobs" / remote.etag
    with _alone(wanted.repo, remote.etag):
        if blob.is_file():
            _check(blob, remote.etag, wanted)
        else:
            _complete(wanted, remote, blob)
    if wanted.sha256 and not stated:
        _check(blob, wanted.sha256, wanted)
    from huggingface_hub import hf_hub_download

    with _told(wanted.repo, wanted.file):
        # the blob is there: this adds its name and the revision's
        path = hf_hub_download(
            wanted.repo,
            wanted.file,
            revision=wanted.revision,
            cache_dir=hub.cache_folder(),
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    return Path(path)


@contextmanager
def _alone(repo: str, etag: str) -> Iterator[None]:
    """Wait for other programs that download the same file, by the lock they use too."""
    from huggingface_hub.utils import WeakFileLock

    lock = hub.cache_folder() / ".locks" / hub.home(repo).name / f"{etag}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        yield


def _remote(wanted: Wanted) -> _Remote:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(
        wanted.repo, wanted.file, revision=wanted.revision, endpoint=os.environ.get("HF_ENDPOINT")
    )
    found = get_hf_file_metadata(url)
    if found.size is None or not found.etag:
        raise SdxlError(f"{url} does not say how large it is; is HF_ENDPOINT a Hugging Face hub?")
    return _Remote(url, found.size, found.etag)


def _complete(wanted: Wanted, remote: _Remote, blob: Path) -> None:
    """Fetch what is missing; the blob takes its name only when its hash is right."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars, enable_progress_bars

    console = consoles.get()
    partial = blob.with_name(f"{blob.name}.incomplete")
    partial.parent.mkdir(parents=True, exist_ok=True)
    here = partial.stat().st_size if partial.is_file() else 0
    if here > remote.size:
        partial.unlink()
        here = 0
    require_room(blob, remote.size - here)
    size = format_bytes(remote.size)
    rest = f", {format_bytes(here)} are here already" if here else ""
    console.note(f"{wanted.repo}/{wanted.file}: {size}{rest}, into {hub.cache_folder()}")
    (enable_progress_bars if console.shows_progress else disable_progress_bars)()
    with _told(wanted.repo, wanted.file), partial.open("ab") as file:
        http_get(
            remote.url,
            file,
            resume_size=here,
            headers=build_hf_headers(),
            expected_size=remote.size,
            displayed_filename=wanted.file,
        )
    _check(partial, remote.etag, wanted)
    partial.replace(blob)


def _check(path: Path, expected: str, wanted: Wanted) -> None:
    """Compare a file with its hash; a wrong file is removed, so that the next attempt does not begin with it."""
    if _SHA256.fullmatch(expected):
        found = _hash(path, hashlib.sha256())
    elif _GIT_SHA1.fullmatch(expected):
        # how git names a file: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
        found = _hash(path, hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False))
    else:
        raise SdxlError(f"{wanted.repo}/{wanted.file}: the hub gives no hash to check it by ({expected!r})")
    if found != expected:
        path.unlink()
        raise FileError(
            f"{wanted.repo}/{wanted.file} came damaged (hash {found[:10]}… instead of {expected[:10]}…) and was "
            "removed; run the same command again"
        )


def _hash(path: Path, digest: Any) -> str:
    with (
        path.open("rb") as file,
        consoles.get().bar("checking the hash", path.stat().st_size) as bar,
    ):
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.advance(len(chunk))
    return str(digest.hexdigest())


def _from_cache(wanted: Wanted) -> Path:
    """The file, when it is here already; its hash is looked at all the same."""
    for copy in hub.snapshots(wanted.repo, wanted.revision):
        path = copy / wanted.file
        if path.is_file():
            consoles.get().note("the network is forbidden by HF_HUB_OFFLINE; taken from the cache")
            known = wanted.sha256 or hub.blob_sha256(path)
            if known:
                _check(path.resolve(), known, wanted)
            return path
    raise _forbidden(f"{wanted.repo}/{wanted.file}")


def _forbidden(what: str) -> NetworkError:
    return NetworkError(
        f"{what} is not in the local cache ({hub.cache_folder()}) and the network is forbidden by HF_HUB_OFFLINE; "
        "unset it and run the same command again, or fetch the file elsewhere and give it with --model"
    )


def _listed(repo: str, revision: str) -> list[str]:
    """The files of a repository."""
    if hub.is_offline():
        raise _forbidden(repo)
    from huggingface_hub import HfApi

    with _told(repo, None):
        return list(HfApi(endpoint=os.environ.get("HF_ENDPOINT")).list_repo_files(repo, revision=revision))


def _model_files(repo: str, names: Sequence[str], variant: str | None) -> list[str]:
    """The one file at the top, else the parts of the diffusers folder."""
    singles = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    # the released models come with a second file that has an older VAE
    singles = [name for name in singles if "0.9vae" not in name] or singles
    if len(singles) == 1 and variant is None:
        return singles
    if INDEX in names:
        return [INDEX, *_folder_files(names, variant)]
    if singles:
        raise FileError(f"{repo} has several files ({', '.join(singles)}); give one as {repo}/{singles[0]}")
    raise FileError(f"{repo} has neither a .safetensors file at its top nor a diffusers folder")


def _folder_files(names: Sequence[str], variant: str | None) -> Iterator[str]:
    """Settings, tokenizers and, of each network, the files of one precision: the asked for one, else what there is."""
    for folder in _FOLDERS:
        inside = [name for name in names if name.rpartition("/")[0] == folder]
        weights = [name for name in inside if name.endswith((".safetensors", ".safetensors.index.json"))]
        marked = [name for name in weights if variant and f".{variant}" in name]
        plain = [name for name in weights if not re.search(r"\.(fp16|bf16|non_ema)\b", name)]
        index = [name for name in weights if ".index." in name]
        yield from (name for name in inside if name.endswith(_TEXTS) and name not in index)
        yield from marked or plain or weights


@contextmanager
def _told(repo: str, file: str | None) -> Iterator[None]:
    """The hub's errors, and those of reaching it, in one line and with what to do."""
    from huggingface_hub import errors

    what = f"{repo}/{file}" if file else repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise FileError(
            f"{repo} asks for an agreement: accept it on its page, then log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileError(f"{repo} has no such revision; see its page for branches and tags") from error
    except errors.RepositoryNotFoundError as error:
        raise FileError(
            f"{repo} is not on the hub, or is private: then log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileError(f"{repo} has no file {file}; see its page for what there is") from error
    except Exception as error:
        if not _is_transport(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SdxlError(
            f"{what} could not be fetched ({reason}); what is here stays: run the same command again to go on"
        ) from error


def _is_transport(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    home = type(error).__module__.partition(".")[0]
    short = isinstance(error, OSError) and "Consistency check failed" in str(error)
    return isinstance(error, HfHubHTTPError | ConnectionError | TimeoutError) or home in _TRANSPORTS or short
