"""Finished latents as files, for pictures that could not be decoded at once."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.header import read_header
from sdxl_cli.errors import FileError
from sdxl_cli.generation.picture import Texts

KEY = "latents"
_PARAMETERS, _RECORD = "parameters", "sdxl"


def save_latents(folder: Path, name: str, latent: Tensor, texts: Texts) -> Path:
    """Write latents [1, z, h, w] beside the pictures, under a free name.

    The texts are those of the picture to be.

    Raises:
        FileError: the folder cannot be written to.
    """
    names = (f"{name}{f'-{i}' if i else ''}.latents.safetensors" for i in count())
    path = next(folder / name for name in names if not (folder / name).exists())
    metadata = {_PARAMETERS: texts.parameters, _RECORD: texts.record}
    with atomic_write(path, overwrite=False) as temporary:
        save_file({KEY: latent.float().cpu().contiguous()}, temporary, metadata)
    return path


def read_latents(path: Path) -> tuple[Tensor, Texts]:
    """Read what :func:`save_latents` wrote.

    Raises:
        FileError: missing, damaged, or something else.
    """
    header = read_header(path)
    if list(header.shapes) != [KEY] or not header.metadata.get(_RECORD):
        raise FileError(f"{path}: holds no latents saved by sdxl generate")
    try:
        latent = load_file(path)[KEY]
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path}: is damaged ({error})") from error
    return latent, Texts(header.metadata.get(_PARAMETERS, ""), header.metadata[_RECORD])
