"""One way to open any file of tensors this program reads: safetensors, torch's pickles, fp8 with scales."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.header import is_pickle
from sdxl_cli.checkpoint.pickle_file import PickleFile
from sdxl_cli.checkpoint.tensor_file import Joined, TensorFile, Tensors
from sdxl_cli.errors import FileError

_WEIGHT = ".weight"
_SCALES = (".scale_weight", ".weight_scale")
"""ComfyUI's names, before and after 2025, of what an fp8 weight is to be multiplied with."""
_UNUSED = (".scale_input", ".input_scale", ".comfy_quant")
"""What only fp8 arithmetic needs."""
_MARK = "scaled_fp8"
"""An empty tensor, last in its name, that says that a part of the model has scales."""


def open_files(paths: Collection[Path], reader: Callable[[Path], Tensors] = TensorFile) -> Tensors:
    """The tensors of one file, or of several as one; fp8 weights that have a scale come multiplied with it.

    Args:
        paths: safetensors files or torch's pickles.
        reader: of safetensors files.

    Raises:
        FileError: a file is missing, damaged, or not to be trusted.
    """
    return descaled(Joined([PickleFile(path) if is_pickle(path) else reader(path) for path in paths]))


def descaled(tensors: Tensors) -> Tensors:
    """The same tensors without scales beside them; unchanged when there are none."""
    scales = {
        name.removesuffix(suffix) + _WEIGHT: name
        for suffix in _SCALES
        for name in tensors.shapes
        if name.endswith(suffix)
        and tensors.dtypes.get(name.removesuffix(suffix) + _WEIGHT, "").startswith("F8_")
    }
    return Descaled(tensors, scales) if scales else tensors


class Descaled:
    """Tensors of which some are fp8 numbers times a scale: one scale per tensor, or one per output row."""

    def __init__(self, tensors: Tensors, scales: Mapping[str, str]) -> None:
        """``scales``: weight -> its scale.

        Raises:
            FileError: a scale has neither one element nor one per row.
        """
        self._tensors, self._scales = tensors, scales
        hidden = {*scales.values()} | {name for name in tensors.shapes if name.endswith((*_UNUSED, _MARK))}
        self.shapes = {name: shape for name, shape in tensors.shapes.items() if name not in hidden}
        self.dtypes = {name: "F32" if name in scales else tensors.dtypes[name] for name in self.shapes}
        self.metadata = dict(tensors.metadata)
        for name, scale in scales.items():
            count = torch.Size(tensors.shapes[scale]).numel()
            if count not in (1, tensors.shapes[name][0]):
                raise FileError(
                    f"{scale} has {count} elements, where {name} {list(tensors.shapes[name])} takes "
                    f"1 or {tensors.shapes[name][0]}; the file is damaged"
                )

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`sdxl_cli.checkpoint.tensor_file.Tensors.read`; scaled weights are fp32 unless cast."""
        if name not in self._scales:
            return self._tensors.read(name, dtype)
        scale = self._tensors.read(self._scales[name], torch.float32)
        rows = (
            scale.reshape(-1, *[1] * (len(self.shapes[name]) - 1)) if scale.numel() > 1 else scale.reshape(())
        )
        # the product is taken in fp32: the scale's own digits count
        return (self._tensors.read(name, torch.float32) * rows).to(dtype or torch.float32)
