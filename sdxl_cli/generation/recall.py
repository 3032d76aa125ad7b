"""How a picture was made, whichever program made it."""

from __future__ import annotations

from pathlib import Path

from sdxl_cli.generation import a1111, comfyui
from sdxl_cli.generation.foreign import Foreign
from sdxl_cli.generation.metadata import Stored, read_record
from sdxl_cli.generation.picture import read_texts


def recall(path: Path) -> Stored | Foreign | None:
    """What the picture says: our own record before A1111's text, and that before ComfyUI's graph.

    Returns:
        None when it says nothing that is understood.

    Raises:
        FileError: the file is missing, is no picture, or its own record is damaged.
        UsageError: it is a grid.
    """
    texts = read_texts(path)
    if texts.record:
        return read_record(path)
    if texts.parameters.strip():
        return a1111.read(texts.parameters)
    if texts.graph:
        try:
            return comfyui.read(texts.graph)
        except (ValueError, TypeError, AttributeError):
            return None
    return None
