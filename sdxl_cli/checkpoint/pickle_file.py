"""Tensors in torch's own files (``.ckpt``, ``.pt``, ``.pth``, ``.bin``), read without running anything in them.

Such a file is a pickle: a program that builds objects. ``torch.load(weights_only=True)`` obeys only the steps that
build tensors and plain containers; a file that asks for more is refused by the name of what it asks for.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.checkpoint.tensor_file import DTYPES
from sdxl_cli.errors import FileError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NESTS = ("state_dict", "model_state_dict")
"""Where training programs put the weights, beside their optimizer."""
_ASKS_FOR = re.compile(r"GLOBAL ([\w.]+)")
_ZIP = b"PK\x03\x04"


class PickleFile:
    """The tensors of one file, below ``state_dict`` when there is one; dictionaries inside become dotted names.

    Files of torch 1.6 and later are mapped into memory: ``read`` costs nothing until the tensor is used, and writing
    into it never reaches the file. Older ones are read whole.
    """

    def __init__(self, path: Path | str) -> None:
        """Read the table of contents.

        Raises:
            FileError: missing, cut short, or it has more than tensors and plain values in it.
        """
        self.path = Path(path)
        content = _load(self.path)
        nested = next((content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), content)
        self._tensors = dict(_tensors(nested))
        if not self._tensors:
            raise FileError(f"{self.path} holds no tensors")
        for name, tensor in self._tensors.items():
            if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
                raise FileError(
                    f"{self.path}: {name} is {tensor.dtype}, {tensor.layout}, which this program does not read"
                )
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: _NAMES[tensor.dtype] for name, tensor in self._tensors.items()}
        self.metadata = {
            str(key): str(value) for key, value in content.items() if isinstance(value, str | int | float)
        }

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`sdxl_cli.checkpoint.tensor_file.Tensors.read`.

        Raises:
            FileError: there is no such tensor.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise FileError(f"{self.path} has no tensor {name}")
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(cast).contiguous()


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # about protocols: they are read or refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise FileError(f"{path} {_refusal(str(error))}") from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        # torch has no one error for damage: a zip without an end is EINVAL when mapped
        here = format_bytes(path.stat().st_size)
        raise FileError(
            f"{path} is cut short, damaged, or no file of torch ({here} are here); download it again"
        ) from error
    if isinstance(content, Tensor):
        return {"tensor": content}
    if not isinstance(content, Mapping):
        raise FileError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return {str(key): value for key, value in content.items()}


def _refusal(error: str) -> str:
    if asked := _ASKS_FOR.search(error):
        return (
            f"wants to run {asked.group(1)} when it is opened, so it is not opened; "
            "get the model as safetensors, or as a .ckpt with nothing but weights"
        )
    return "is a pickle that is damaged or holds more than weights; get the model as safetensors"


def _tensors(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")
