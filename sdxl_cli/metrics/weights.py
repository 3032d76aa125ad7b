"""Weights of the networks that metrics are made of: found in local caches, given as files, never fetched unasked.

A metric is its weights: another network, or the same one trained by somebody else, gives other numbers. So what is
not found is an error that says what to get and from where, and never a reason to take something else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl_cli.checkpoint.header import is_pickle
from sdxl_cli.checkpoint.hub import user_cache
from sdxl_cli.checkpoint.pickle_file import PickleFile
from sdxl_cli.checkpoint.tensor_file import TensorFile, Tensors
from sdxl_cli.errors import FileError, NetworkError

_CHUNK = 1 << 24
"""Bytes hashed at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A file that others publish."""

    what: str
    """For people."""
    names: tuple[str, ...]
    """What it is called in torch's cache, the best known name first."""
    url: str = ""
    """Where it is published."""
    size: str = ""
    """Of the download."""
    sha256: str = ""
    """How its hash begins; empty when nobody says."""
    packages: tuple[tuple[str, str], ...] = ()
    """Python packages that have it: (importable name, path inside)."""
    install: str = ""
    """A command that brings it, where there is one."""


KNOWN = {
    "vgg16": Known(
        what="torchvision's VGG16",
        names=("vgg16-397923af.pth",),
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        size="528 MB",
        sha256="397923af",
    ),
    "alexnet": Known(
        what="torchvision's AlexNet",
        names=("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth"),
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        size="233 MB",
    ),
    "lpips-vgg": Known(
        what="LPIPS' weights for VGG",
        names=("lpips_vgg.pth",),
        sha256="a78928a0af1e5f0f",
        packages=(
            ("lpips", "weights/v0.1/vgg.pth"),
            ("torchmetrics", "functional/image/lpips_models/vgg.pth"),
        ),
        install="pip install 'sdxl-cli[eval]'",
    ),
    "lpips-alex": Known(
        what="LPIPS' weights for AlexNet",
        names=("lpips_alex.pth",),
        sha256="df73285e35b22355",
        packages=(
            ("lpips", "weights/v0.1/alex.pth"),
            ("torchmetrics", "functional/image/lpips_models/alex.pth"),
        ),
        install="pip install 'sdxl-cli[eval]'",
    ),
    "inception": Known(
        what="the Inception network of FID (2015-12-05)",
        names=("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        size="91 MB",
    ),
}
"""By the name they have in this program."""


def torch_cache() -> Path:
    """Where ``torch.hub``, torchvision, torchmetrics, lpips, pytorch-fid and torch-fidelity keep what they fetch."""
    home = os.environ.get("TORCH_HOME")
    return (Path(home).expanduser() if home else user_cache() / "torch") / "hub" / "checkpoints"


def find_weights(name: str, flag: str) -> Path:
    """The file of a published network, in torch's cache or in an installed package.

    Args:
        name: one of ``KNOWN``.
        flag: what takes another place on the command line, for the error.

    Raises:
        NetworkError: it is nowhere; the error says what to get from where, and where to put it.
        FileError: a file has its name and other contents.
    """
    known = KNOWN[name]
    cached = [torch_cache() / file for file in known.names]
    for path in [*cached, *filter(None, (_in_package(*place) for place in known.packages))]:
        if path.is_file():
            _check(path, known)
            return path
    where = f"get {known.url} ({known.size})" if known.url else known.install
    raise NetworkError(
        f"{known.what} is not here, and this command fetches nothing: {where}"
        + (f" and put it into {torch_cache()} or give it with {flag}" if known.url else f", or {flag} FILE")
    )


def open_weights(paths: Sequence[Path]) -> list[Tensors]:
    """Files of tensors: safetensors, or torch's own read without running anything in them.

    Raises:
        FileError: missing, damaged, or more than tensors.
    """
    return [_opened(path) for path in paths]


def _opened(path: Path) -> Tensors:
    path = path.expanduser()
    if not path.is_file():
        raise FileError(f"{path}: no such file of weights")
    return PickleFile(path) if is_pickle(path) else TensorFile(path)


def _in_package(package: str, inside: str) -> Path | None:
    """A file of an installed package; the package itself is not imported."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent / inside if found and found.origin else None


def _check(path: Path, known: Known) -> None:
    """Refuse a download that is cut short, or something else by the same name."""
    if not known.sha256:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    if not digest.hexdigest().startswith(known.sha256):
        raise FileError(
            f"{path} is not {known.what}: its sha256 begins with {digest.hexdigest()[:8]}, not {known.sha256}; "
            "remove it and get it again"
        )
