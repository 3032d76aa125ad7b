"""Textual inversion files: learned vectors that stand in a prompt like a word (arXiv 2208.01618).

An embedding for SDXL has vectors for both text encoders, ``clip_l`` [n, 768] and ``clip_g`` [n, 1280]. Those for other
models are told apart by their width and refused: the vectors of one model mean nothing to another.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import ModelConfig

MAX_VECTORS = 75
"""What fits between a start and an end token."""

_KEYS = (("clip_l", "text_encoders_0"), ("clip_g", "text_encoders_1"))
"""Names of the two halves: those everybody writes, and those of early diffusers training scripts."""

_ARCHITECTURES = {
    768: "Stable Diffusion 1.x (one text encoder, 768 wide)",
    1024: "Stable Diffusion 2.x (one text encoder, 1024 wide)",
    1280: "bigG alone (1280 wide), half of what SDXL needs",
}


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vectors of a textual inversion."""

    path: Path
    clip_l: Tensor
    """[n, width of CLIP-L]."""
    clip_g: Tensor
    """[n, width of bigG]."""

    @property
    def count(self) -> int:
        """Vectors, and so tokens that it takes in a prompt."""
        return len(self.clip_g)

    def require_fit(self, config: ModelConfig) -> None:
        """Refuse an embedding that was trained for text encoders of other widths. A refiner reads only ``clip_g``.

        Raises:
            FileError: a width is not the model's.
        """
        towers = {"clip_g": (self.clip_g, config.big_g), "clip_l": (self.clip_l, config.clip_l)}
        for name, (vectors, tower) in towers.items():
            if tower is not None and vectors.shape[1] != tower.width:
                raise FileError(
                    f"{self.path}: its {name} vectors are {vectors.shape[1]} wide, the model's text encoder is "
                    f"{tower.width}; it was trained for another model"
                )


def read_embedding(path: Path) -> Embedding:
    """Read a textual inversion for SDXL: safetensors, or a pickle of nothing but tensors.

    Raises:
        FileError: the file is missing, damaged, no textual inversion, or one for another architecture, which the text
            names.
    """
    state = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    halves = [next((state[key] for key in keys if key in state), None) for keys in _KEYS]
    clip_l, clip_g = (half if isinstance(half, Tensor) else None for half in halves)
    if clip_l is None or clip_g is None:
        raise FileError(f"{path} is {_other(state)}; an embedding for SDXL has clip_l and clip_g")
    clip_l, clip_g = (half.reshape(-1, half.shape[-1]).float() for half in (clip_l, clip_g))
    if len(clip_l) != len(clip_g):
        raise FileError(
            f"{path}: {len(clip_l)} vectors for CLIP-L and {len(clip_g)} for bigG; the file is damaged"
        )
    if not 0 < len(clip_g) <= MAX_VECTORS:
        raise FileError(f"{path}: {len(clip_g)} vectors; 1 to {MAX_VECTORS} can stand in a prompt")
    for half in (clip_l, clip_g):
        if not bool(torch.isfinite(half).all()):
            raise FileError(f"{path}: a vector has NaN or infinity; the file is damaged")
    return Embedding(path, clip_l, clip_g)


def _safetensors(path: Path) -> Mapping[str, Any]:
    file = TensorFile(path)
    # an embedding is small; what is not one need not be read to be refused
    if len(file.shapes) > 2 * len(_KEYS):
        raise FileError(f"{path} has {len(file.shapes)} tensors; it is no textual inversion")
    return {name: file.read(name) for name in file.shapes}


def _pickled(path: Path) -> Mapping[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise FileError(
            f"{path} holds more than tensors, or is damaged, and is not opened because it could run code; "
            "get the .safetensors file"
        ) from error
    except (OSError, RuntimeError, EOFError, BadZipFile, ValueError, KeyError, IndexError) as error:
        raise FileError(f"{path} cannot be read as a textual inversion; download it again") from error
    return state if isinstance(state, Mapping) else {}


def _other(state: Mapping[str, Any]) -> str:
    """What a file that is no embedding for SDXL is, in words."""
    # A1111 saves {"string_to_param": {"*": [n, width]}}, diffusers {"<word>": [width]}, others {"emb_params": ...}
    values = state.get("string_to_param", state)
    tensors = [
        value for value in getattr(values, "values", list)() if isinstance(value, Tensor) and value.ndim
    ]
    if len(tensors) == 1 and (name := _ARCHITECTURES.get(tensors[0].shape[-1])):
        return f"a textual inversion for {name}"
    return "no textual inversion for any Stable Diffusion model"
