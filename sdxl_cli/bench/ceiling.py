"""What the machine can do at best: the rate of plain matrix products, measured in the same process."""

from __future__ import annotations

import time

import torch

from sdxl_cli.bench.timing import wait

SHAPES = {"cpu": ((2048, 1280, 5120), (1536, 1536, 1536)), "cuda": ((8192, 8192, 8192), (16384, 4096, 5120))}
"""(rows, inner, columns) of products; the first of each is shaped like a layer of the U-Net."""
_AT_LEAST, _RUNS = 0.4, 3
"""Seconds and runs per shape."""


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate seen, in floating-point operations per second.

    The numbers are random: zeros switch fewer transistors and run faster than any real work.
    """
    shapes = SHAPES["cpu" if device.type == "cpu" else "cuda"]
    return max(_rate(shape, dtype, device) for shape in shapes)


def _rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    rows, inner, columns = shape
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    many = 1 if device.type == "cpu" else 10
    torch.mm(a, b, out=out)
    wait(device)
    best, runs, since = 0.0, 0, time.perf_counter()
    while runs < _RUNS or time.perf_counter() - since < _AT_LEAST:
        runs += 1
        start = time.perf_counter()
        for _ in range(many):
            torch.mm(a, b, out=out)
        wait(device)
        best = max(best, 2.0 * rows * inner * columns * many / (time.perf_counter() - start))
    return best
