"""What ran it: a result without it means nothing."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from sdxl_kernels import cuda_norm

from sdxl_cli import __version__


def machine(device: torch.device, packages: tuple[str, ...] = ()) -> dict[str, str | int]:
    """Processor or GPU, memory, threads, system, versions.

    Args:
        device: where the work runs.
        packages: distributions whose versions matter too; those not installed are left out.
    """
    found: dict[str, str | int] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "memory": memory_bytes(),
        "system": platform.platform(terse=True),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu memory": properties.total_memory,
            "driver": driver(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
            "group norm": group_norm(device),
        }
    else:
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found |= {"sdxl": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    return found | {name: v for name in packages if (v := _version(name))}


def group_norm(device: torch.device) -> str:
    """Which one networks in 16 bits get there: the one that leaves channels last, or torch's and why."""
    found = cuda_norm.ready(device, torch.float16)
    return f"torch's, channels first: {found}" if isinstance(found, str) else "fused, channels last"


def driver(told: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's driver; empty where nobody says."""
    try:
        match = re.search(r"Kernel Module\D*([\d.]+)", told.read_text("utf-8", "replace"))
    except OSError:
        match = None
    return match[1] if match else ""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, as Linux has it or as Python does."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text("utf-8", "replace"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Of the whole machine; 0 where nobody says."""
    try:
        match = re.search(r"^MemTotal:\s*(\d+) kB$", meminfo.read_text("utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
