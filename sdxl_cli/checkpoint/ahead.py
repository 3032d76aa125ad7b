"""Files are read from the disk while the program is still importing."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.meminfo import MEMINFO, available_memory

POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ, since 5.14: bring the pages of a mapping in."""
CHUNK = 256 << 20
"""Bytes per call, between which the program may end."""
SHARE = 0.5
"""Of the free memory, which a model's files may take. Of larger ones, the first would be gone before it is needed."""
_ORDER = ("text_encoder", "text_encoder_2", "model", "unet", "vae")
"""In which the parts of a model are used."""


def read_ahead(files: Sequence[ModelFiles], meminfo: Path = MEMINFO) -> threading.Thread | None:
    """Begin to read models into the system's cache, in the order in which their parts are used.

    It is a hint: nothing waits for it, and what cannot be read is told by those who need it. What is in memory
    already costs some hundredths of a second per GB, of another thread.

    Args:
        files: the models.
        meminfo: where Linux says how much memory is free.

    Returns:
        The thread that reads; None where nothing is read: on other systems, or when the files are too large.
    """
    free = available_memory(meminfo)
    if not sys.platform.startswith("linux") or free is None or sum(f.size for f in files) > SHARE * free:
        return None
    parts = [(part.name, path) for model in files for part in model.components for path in part.paths]
    order = {name: number for number, name in enumerate(_ORDER)}
    paths = [path for _, path in sorted(parts, key=lambda part: order.get(part[0], len(order)))]
    thread = threading.Thread(target=_read, args=(paths,), name="read ahead", daemon=True)
    thread.start()
    return thread


def _read(paths: Sequence[Path]) -> None:
    # a call through ctypes lets other threads run meanwhile, one through mmap does not
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for path in paths:
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
                _populate(pages, advise)
        except (OSError, ValueError):  # a file that is gone or empty: whoever reads it says so
            continue


def _populate(pages: mmap.mmap, advise: Callable[[int, int, int], int]) -> None:
    hold = (ctypes.c_char * 0).from_buffer(pages)
    start = ctypes.addressof(hold)
    for first in range(0, len(pages), CHUNK):
        if advise(start + first, min(CHUNK, len(pages) - first), POPULATE_READ):
            break  # an older kernel
    del hold  # or the mapping cannot be closed
