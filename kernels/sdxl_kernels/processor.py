"""What the processor computes in."""

from __future__ import annotations

import re
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def cpu_multiplies_bf16() -> bool:
    """Whether the processor has x86's matrix products in bf16: AVX512_BF16, AMX. What is said of these was measured."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cpu_has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether it has instructions for bf16 at all: those, or ARM's, as far as Linux says."""
    if cpu_multiplies_bf16():
        return True
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    features = re.search(r"^Features\s*:(.*)$", text, re.MULTILINE)
    return bool(features and "bf16" in features[1].split())
