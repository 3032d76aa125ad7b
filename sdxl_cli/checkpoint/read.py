"""Files to models: built on the meta device, then given their tensors straight from the mapped file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sdxl_cli.checkpoint.diffusers_folder import Component
from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.identify import CLIP_L, TOKEN_IDS, UNET, VAE, big_g_prefix, compare
from sdxl_cli.checkpoint.layouts import (
    Plan,
    Source,
    big_g_to_original,
    clip_l_to_original,
    prefixed,
    unet_to_original,
    vae_to_original,
)
from sdxl_cli.checkpoint.opening import open_files
from sdxl_cli.checkpoint.tensor_file import DTYPES, Joined, Renamed, TensorFile, Tensors
from sdxl_cli.checkpoint.vocabulary import Expanded
from sdxl_cli.errors import FileError
from sdxl_cli.model.blank import blank
from sdxl_cli.model.config import ALL_PARTS, PREFIXES, ModelConfig, Part
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Autoencoder


class Merge(Protocol):
    """Changes parameters while they are loaded."""

    def changes(self, name: str) -> bool:
        """Whether it changes the parameter of this name."""
        ...

    def __call__(self, name: str, parameter: Tensor) -> Tensor:
        """The changed parameter, in fp32; ``parameter`` is left alone."""
        ...


def load_model(
    files: ModelFiles,
    parts: Collection[Part] = ALL_PARTS,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    merge: Merge | None = None,
) -> SDXL:
    """Load a model, or parts of it, ready to run: eval mode, no gradients.

    Where the file already has the wanted dtype and the device is the CPU, the parameters are the file's own pages
    and nothing is copied; otherwise every tensor is cast and moved by itself.

    Args:
        files: from :func:`sdxl_cli.checkpoint.locate.locate`.
        parts: which networks to load.
        dtype: of the U-Net and the text encoders.
        vae_dtype: of the autoencoder.
        device: where the model is to be.
        merge: changes some of the parameters on their way, in fp32; the others stay the file's own.

    Raises:
        FileError: tensors are missing, unexpected or of another shape; the text names the first of them.
    """
    with blank():
        model = SDXL(files.config, parts)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = Expanded(_of_parts(open_tensors(files), parts), files.config)
    if differences := str(compare(tensors.shapes, wanted)):
        raise FileError(f"{files.path} does not fit {files.identity.label}: {differences}")
    state = {}
    for name in tensors.shapes:
        if name in wanted:
            cast = vae_dtype if name.startswith(PREFIXES["vae"]) else dtype
            if merge is not None and merge.changes(name):
                whole = tensors.read(name, torch.float32).reshape(wanted[name]).to(device)
                state[name] = merge(name, whole).to(cast)
                continue
            state[name] = tensors.read(name, cast).reshape(wanted[name]).to(device)
    # what a file may lack is used by nothing
    state |= {
        name: torch.zeros(wanted[name], dtype=dtype, device=device) for name in wanted if name not in state
    }
    model.load_state_dict(state, assign=True)
    model.known_token_ids = tensors.known_token_ids
    # moves the buffers that are in no file
    return model.to(device).eval().requires_grad_(False)


def load_vae(files: ModelFiles, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Autoencoder:
    """Load the autoencoder alone, from a whole model or a VAE's own file; see :func:`load_model`."""
    return load_model(files, _VAE_ONLY, dtype=dtype, vae_dtype=dtype, device=device).vae


def stored_dtype(files: ModelFiles, part: Part) -> torch.dtype:
    """The floating-point type that most tensors of a part are stored in."""
    tensors = open_tensors(files)
    names = [DTYPES[tensors.dtypes[name]] for name in tensors.shapes if name.startswith(PREFIXES[part])]
    return Counter(dtype for dtype in names if dtype.is_floating_point).most_common(1)[0][0]


def open_tensors(files: ModelFiles, reader: Callable[[Path], Tensors] = TensorFile) -> Tensors:
    """All tensors of a model under the names of the original single file; none is read yet.

    Args:
        files: from :func:`sdxl_cli.checkpoint.locate.locate`.
        reader: of safetensors files.

    Raises:
        FileError: a file is missing or damaged.
    """
    mine = Joined([_original(component, files, reader) for component in files.components])
    if files.vae is None:
        return mine
    other = _of_parts(open_tensors(files.vae, reader), _VAE_ONLY)
    rest = [name for name in mine.shapes if not name.startswith(PREFIXES["vae"])]
    return Joined([Renamed(mine, _same(rest)), other])


def _original(component: Component, files: ModelFiles, reader: Callable[[Path], Tensors]) -> Tensors:
    """A component's tensors under the names of the single file."""
    tensors = open_files(component.paths, reader)
    keys, config = list(tensors.shapes), files.config
    kind = component.name if component.name != "model" else files.identity.kind
    if kind == "vae" and all(not key.startswith(VAE) for key in keys):
        bare = vae_to_original(keys, config.vae) if files.layout == "diffusers" else _same(keys)
        return Renamed(tensors, prefixed(bare, VAE))
    if component.name == "model":
        return tensors
    return Renamed(tensors, _FOLDER[component.name](keys, config))


_VAE_ONLY: tuple[Part, ...] = ("vae",)

_FOLDER: Mapping[str, Callable[[list[str], ModelConfig], Plan]] = {
    "unet": lambda keys, config: prefixed(unet_to_original(keys, config.unet), UNET),
    "text_encoder": lambda keys, _: prefixed(clip_l_to_original(keys), CLIP_L),
    "text_encoder_2": lambda keys, config: prefixed(big_g_to_original(keys), big_g_prefix(config)),
}


def _same(keys: Collection[str]) -> Plan:
    return {key: Source((key,)) for key in keys}


def _of_parts(tensors: Tensors, parts: Collection[Part]) -> Tensors:
    """Only the tensors of some parts; what belongs to no part is left out."""
    prefixes = tuple(PREFIXES[part] for part in parts)
    keep = [name for name in tensors.shapes if name.startswith(prefixes)]
    if "text" in parts and TOKEN_IDS in tensors.shapes:
        keep.append(TOKEN_IDS)
    return Renamed(tensors, _same(keep))
