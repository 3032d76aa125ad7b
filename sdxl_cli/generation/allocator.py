"""How the C library hands out memory: for tensors that come and go, its own settings cost more than they save."""

from __future__ import annotations

import ctypes
import os
import sys

LARGEST = 512 << 20
"""Bytes. Blocks up to this size are kept for the next one; larger ones go back to the system at once."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
_ENVIRONMENT = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def reuse_large_blocks() -> bool:
    """Let freed blocks of up to 512 MiB be used again instead of being fetched from the system, and cleared, anew.

    What the system gives is cleared page by page: a transformed convolution kernel of 240 MB costs more than it
    saves. Does nothing outside glibc, and nothing when the environment has settings of its own.

    Returns:
        Whether the settings are changed.
    """
    libc = _glibc()
    if libc is None or any(name in os.environ for name in _ENVIRONMENT):
        return False
    # setting one of the two turns off that both grow by themselves
    return bool(libc.mallopt(_MMAP_THRESHOLD, LARGEST) and libc.mallopt(_TRIM_THRESHOLD, 2 * LARGEST))


def give_back() -> None:
    """Return what was freed to the system; when something large was let go of."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
