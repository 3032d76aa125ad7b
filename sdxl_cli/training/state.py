"""A training state on disk: everything needed to go on, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.checkpoint.write import save_tensors
from sdxl_cli.errors import FileError

STATE_FILE = "state.safetensors"
KEY = "sdxl.training"


def save_state(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Replace the state in a run's folder, atomically.

    Args:
        folder: of the run.
        tensors: weights, averages and optimizer moments, by name.
        values: JSON values: step, configuration.
    """
    save_tensors(folder / STATE_FILE, tensors, {KEY: json.dumps(values)})


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of :func:`save_state`.

    Raises:
        FileError: there is no state there, or it is damaged.
    """
    path = folder / STATE_FILE
    file = TensorFile(path)
    if KEY not in file.metadata:
        raise FileError(f"{path}: not a training state; give --output a folder that a training run wrote")
    return {name: file.read(name) for name in file.shapes}, json.loads(file.metadata[KEY])
