"""From what people type to files: a path, a folder, a name in the local Hugging Face cache, or the bundled model.

Imports no torch, so that a wrong path is told at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from sdxl_cli import console as consoles
from sdxl_cli.checkpoint import diffusers_folder, hub
from sdxl_cli.checkpoint.diffusers_folder import Component
from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.header import Header, format_bytes, is_pickle, read_header
from sdxl_cli.checkpoint.identify import Identity, Kind, identify
from sdxl_cli.errors import FileError, NetworkError, SdxlError, UsageError
from sdxl_cli.model.config import BASE

if TYPE_CHECKING:
    from sdxl_cli.checkpoint.pickle_file import PickleFile

Role = Literal["base", "refiner", "vae", "model", "any", "file"]
"""What a model is wanted for; ``model`` takes a base or a refiner, ``any`` whatever is SDXL or its autoencoder,
``file`` whatever it is."""

_CACHE = "the local Hugging Face cache"

BUNDLED = Path(__file__).parent.parent / "bundled"
"""The folder of the bundled model."""

_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Of files of tensors."""

_ACCEPTED: dict[Role, tuple[Kind, ...]] = {
    "base": ("base", "inpaint"),
    "refiner": ("refiner",),
    "vae": ("vae", "base", "refiner", "inpaint"),
    "model": ("base", "refiner"),
    "any": ("base", "refiner", "inpaint", "vae"),
    "file": get_args(Kind),
}
_WANTED: dict[Role, str] = {
    "base": "an SDXL base model",
    "refiner": "an SDXL refiner model",
    "vae": "an SDXL VAE",
    "model": "an SDXL base or refiner model",
    "any": "an SDXL model or VAE",
    "file": "a file of tensors",
}
_ADVICE: dict[Kind, str] = {
    "base": "give it with --model",
    "refiner": "give it with --refiner",
    "inpaint": "it can make and repaint pictures with --model of sdxl generate, and nothing else",
    "vae": "give it with --vae, beside a model",
    "unet": "it lacks the text encoders; give the whole checkpoint or its diffusers folder",
    "text encoder": "give the whole checkpoint",
    "adapter": "it changes a model and is none itself",
    "other": "only Stable Diffusion XL models can be used",
}


def locate(spec: str | None, role: Role = "base", *, variant: str | None = None) -> ModelFiles:
    """Find a model's files and look at what they are.

    Args:
        spec: a safetensors file or a torch pickle (.ckpt, .pt), a diffusers folder, a hub id in the local cache
            (``org/name``, ``org/name@revision``, ``org/name/file.safetensors``), one of ``base``, ``refiner``,
            ``vae``, ``bundled``; None is the released model if the cache has it, else the bundled one.
        role: what it is wanted for; anything else is refused by name.
        variant: for diffusers folders with several precisions, the one to prefer (``"fp16"``).

    Raises:
        FileError: missing, damaged, or not what is wanted.
        NetworkError: a hub id that is not in the local cache.
        UsageError: neither a path nor a hub id.
    """
    if spec is None:
        return _default(role, variant)
    path = Path(spec).expanduser()
    if path.exists():
        return _wanted(_at(path, variant), role)
    if spec == "bundled":
        return _bundled(role)
    parsed = hub.parse_id(hub.SHORT_NAMES.get(spec, spec))
    if parsed and (hub.snapshots(*parsed[:2]) or not _looks_like_path(spec)):
        repo, revision, file = parsed
        return (
            _file_in_cache(repo, revision, file, role) if file else _in_cache(repo, revision, role, variant)
        )
    if path.suffix or "/" in spec or "\\" in spec:
        raise FileError(f"{spec}: no such file or folder{_nearby(path)}")
    raise UsageError(
        f"{spec!r} is no file, folder or hub id; there are also {', '.join(hub.SHORT_NAMES)} and bundled"
    )


def _default(role: Role, variant: str | None) -> ModelFiles:
    """The released model; without a copy of it the bundled one, and a copy that is not whole is told of."""
    released = "base" if role in ("model", "any", "file") else role
    repo = hub.SHORT_NAMES[released]
    try:
        return _in_cache(repo, None, role, variant)
    except NetworkError:  # there is no copy
        pass
    except SdxlError as error:
        consoles.get().warn(f"{error}; the bundled tiny model takes its place")
    return _bundled(role)


def _bundled(role: Role) -> ModelFiles:
    name = "refiner" if role == "refiner" else "base"
    path = BUNDLED / f"{name}.safetensors"
    if not path.is_file():
        raise FileError(
            f"the bundled model is not in this installation ({path}); reinstall, or give --model FILE"
        )
    return replace(_wanted(_file(path), role), name=f"sdxl-tiny-{name}", is_bundled=True)


def _in_cache(repo: str, revision: str | None, role: Role, variant: str | None) -> ModelFiles:
    """The first copy of a repository that has a whole model of the wanted kind; single files before folders."""
    problems: list[str] = []
    for copy in hub.snapshots(repo, revision):
        try:
            found = _only(repo, copy, role) or _wanted(_at(copy, variant), role)
        except SdxlError as error:
            problems.append(_damage(copy) or str(error))
            continue
        name = found.name if found.path.is_file() else repo.partition("/")[2]
        return replace(found, name=name, origin=_CACHE)
    if partial := hub.partial_download(repo):
        here = format_bytes(partial.stat().st_size)
        raise FileError(
            f"{repo} is in the local cache but not whole: a download stopped ({here} are here); "
            f"`sdxl download {hub.typed_name(repo)}` goes on with it"
        )
    if problems:
        raise FileError(f"{repo} is in the local cache but cannot be used: {problems[0]}")
    raise _not_cached(repo)


def _file_in_cache(repo: str, revision: str | None, file: str, role: Role) -> ModelFiles:
    paths = [copy / file for copy in hub.snapshots(repo, revision) if (copy / file).is_file()]
    if not paths:
        raise _not_cached(f"{repo}/{file}")
    return replace(_wanted(_file(paths[0]), role), origin=_CACHE)


def _not_cached(what: str) -> NetworkError:
    return NetworkError(
        f"{what} is not in the local cache ({hub.cache_folder()}) and this command uses no network; "
        f"`sdxl download {hub.typed_name(what)}` gets it, or give a file"
    )


def _only(repo: str, folder: Path, role: Role) -> ModelFiles | None:
    """The one file at the top of a folder that is of the wanted kind; None when there is none."""
    files = [found for found in _singles(folder) if found.identity.kind in _ACCEPTED[role]]
    # the released models come with a second file that has an older VAE
    files = [found for found in files if "0.9vae" not in found.name] or files
    if len(files) > 1:
        names = ", ".join(found.path.name for found in files)
        raise FileError(f"it has several models ({names}); give one as {repo}/{files[0].path.name}")
    return files[0] if files else None


def _damage(folder: Path) -> str:
    """What is wrong with the first file at the top of a folder that cannot be read; empty without one."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_header(path)
        except SdxlError as error:
            return str(error)
    return ""


def _singles(folder: Path) -> Iterator[ModelFiles]:
    """The whole files a folder has at its top."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            yield _file(path)
        except SdxlError:  # something else, or still incomplete: another copy may be whole
            continue


def _wanted(files: ModelFiles, role: Role) -> ModelFiles:
    identity = files.identity
    if identity.kind in _ACCEPTED[role]:
        return files
    raise FileError(f"{files.path} is {identity.label}, not {_WANTED[role]}; {_ADVICE[identity.kind]}")


def _at(path: Path, variant: str | None) -> ModelFiles:
    if path.is_file():
        return _file(path)
    if diffusers_folder.is_pipeline(path):
        return _pipeline(path, variant)
    if diffusers_folder.is_vae(path):
        component, vae = diffusers_folder.read_vae(path, variant)
        identity = Identity(kind="vae", label="a VAE", layout="diffusers", config=replace(BASE, vae=vae))
        return _files(path, (component,), identity)
    if diffusers_folder.is_pipeline(path.parent):
        raise FileError(f"{path} is one part of a diffusers folder; give the whole one, {path.parent}")
    models = sorted(path.glob("*.safetensors"))
    hint = f"; give a file, such as {models[0]}" if models else ""
    raise FileError(f"{path} is a folder without {diffusers_folder.INDEX}, so no diffusers model{hint}")


def _file(path: Path) -> ModelFiles:
    contents = _contents(path)
    try:
        identity = identify(contents.shapes, contents.metadata)
    except FileError as error:
        raise FileError(f"{path}: {error}") from error
    return _files(path, (Component("model", (path,)),), identity)


def _contents(path: Path) -> Header | PickleFile:
    """A file's table of contents. That of a pickle needs torch, which takes seconds to import."""
    if not is_pickle(path):
        return read_header(path)
    from sdxl_cli.checkpoint.pickle_file import PickleFile

    return PickleFile(path)


def _pipeline(path: Path, variant: str | None) -> ModelFiles:
    folder = diffusers_folder.read_pipeline(path, variant)
    kind: Kind = "refiner" if folder.config.is_refiner else "base"
    label = f"an SDXL {kind} model"
    if (channels := folder.config.unet.in_channels) != folder.config.vae.z_channels:
        kind = "inpaint" if channels == 9 else "other"
        label = f"an SDXL model with {channels} input channels"
    shapes = [
        shape
        for component in folder.components
        for file in component.paths
        for shape in _contents(file).shapes.values()
    ]
    identity = Identity(
        kind=kind,
        label=label,
        layout="diffusers",
        config=folder.config,
        prediction=folder.prediction,
        zero_terminal_snr=folder.zero_terminal_snr,
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes),
    )
    return _files(path, folder.components, identity)


def _files(path: Path, components: tuple[Component, ...], identity: Identity) -> ModelFiles:
    return ModelFiles(
        name=path.stem if path.is_file() else path.resolve().name,
        path=path,
        layout=identity.layout,
        components=components,
        identity=identity,
        config=identity.config or BASE,
    )


def _looks_like_path(spec: str) -> bool:
    """Whether people who type this mean a file, though a hub id may look the same."""
    first = spec.startswith((".", "/", "~", "\\"))
    inside = "/" in spec and Path(spec).parent.is_dir()
    return first or inside or (spec.endswith(_SUFFIXES) and spec.count("/") < 2)


def _nearby(path: Path) -> str:
    """Files of the same folder with a similar name."""
    if not path.parent.is_dir():
        return f" (the folder {path.parent} does not exist)"
    names = [file.name for file in path.parent.iterdir() if file.suffix in _SUFFIXES]
    near = get_close_matches(path.name, names, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
