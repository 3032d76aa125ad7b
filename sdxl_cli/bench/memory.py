"""The most memory in use while something runs."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Of proc(5): sets VmHWM back to what is resident now."""
_INTERVAL = 0.005
"""Seconds between looks at what only a look can tell."""


@dataclass(slots=True)
class Peak:
    """Bytes; 0 where the system does not tell."""

    before: int = 0
    """In use when it began."""
    most: int = 0
    """The most at once: of tensors on a GPU, else of the process's pages in memory, those of mapped files too."""
    own_before: int = 0
    own: int = 0
    """The most of the process's own pages, without those of mapped files, which processes share."""
    reserved: int = 0
    """The most that torch took from a GPU."""
    of_run: bool = True
    """False: the system tells the process's peak only, which may be of something before."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch until the block ends; the result is complete then."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak.before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.most = torch.cuda.max_memory_allocated(device)
        peak.reserved = torch.cuda.max_memory_reserved(device)
    elif _STATUS.exists():
        with _watched(peak):
            yield peak
    else:
        peak.of_run = False
        yield peak
        peak.most = _process_peak()


@contextmanager
def _watched(peak: Peak) -> Iterator[None]:
    """By Linux's own counters, and for what it keeps no peak of, by looking often."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:  # in some containers
        peak.of_run = False
    peak.before, peak.own_before = _status("VmRSS"), _status("RssAnon")
    done = threading.Event()

    def look() -> None:
        while not done.wait(_INTERVAL):
            peak.own = max(peak.own, _status("RssAnon"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        peak.own = max(peak.own, _status("RssAnon"))
        peak.most = _status("VmHWM")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text("utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _process_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
