"""Textual inversion files: learned vectors that stand in a prompt like a word (arXiv 2208.01618).

An embedding for SDXL has vectors for both text encoders, ``clip_l`` [n, 768] and ``clip_g`` [n, 1280]. Those for other
models are told apart by their width and refused: the vectors of one model mean nothing to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.opening import open_files
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
    tensors = open_files([path])
    names = [next((key for key in keys if tensors.shapes.get(key)), None) for keys in _KEYS]
    if None in names:
        raise FileError(f"{path} is {_other(tensors.shapes)}; an embedding for SDXL has clip_l and clip_g")
    clip_l, clip_g = (
        tensors.read(name, torch.float32).reshape(-1, tensors.shapes[name][-1]) for name in names if name
    )
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


def _other(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file that is no embedding for SDXL is, in words."""
    # A1111 saves {"string_to_param": {"*": [n, width]}}, diffusers {"<word>": [width]}, others {"emb_params": ...}
    vectors = [shape for shape in shapes.values() if shape]
    if len(vectors) == 1 and (name := _ARCHITECTURES.get(vectors[0][-1])):
        return f"a textual inversion for {name}"
    return "no textual inversion for any Stable Diffusion model"
