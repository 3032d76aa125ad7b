"""How much memory a computer has to give, asked without torch."""

from __future__ import annotations

import re
from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def available_memory(meminfo: Path = MEMINFO) -> int | None:
    """Bytes that programs can have without swapping, as Linux says; None where nobody says."""
    return _said(meminfo, "MemAvailable")


def total_memory(meminfo: Path = MEMINFO) -> int | None:
    """Bytes that there are, as Linux says; None where nobody says."""
    return _said(meminfo, "MemTotal")


def _said(meminfo: Path, name: str) -> int | None:
    try:
        text = meminfo.read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(rf"^{name}:\s*(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
