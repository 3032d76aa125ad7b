"""One side of a comparison in a process of its own: python benchmarks/contestant.py SIDE VARIANT JOB.

Loads what the job needs, then does it once for every line on stdin, and says what it took in a line of JSON on stdout.
While the other side runs, it waits for a line. ``harness`` speaks to it.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def main() -> None:
    side, variant, text = sys.argv[1:4]
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no answer

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    import torch
    from job import Job

    from sdxl_cli.bench.machine import machine
    from sdxl_cli.bench.memory import peak_memory
    from sdxl_cli.generation.device import compute_as_told

    job = Job.from_text(text)
    device = torch.device(job.device)
    torch.set_num_threads(job.threads)
    compute_as_told(torch.float32)
    with torch.inference_mode():
        module = import_module(f"side_{side}")
        with peak_memory(device) as memory:
            work = module.build(job, variant)
        seconds = time.perf_counter() - STARTED
        answer({"seconds": seconds, "loading": _bytes(memory), "machine": machine(device, module.PACKAGES)})
        for line in sys.stdin:
            answer(_done(json.loads(line), work, torch.device(job.device)))


def _done(order: dict[str, Any], work: Any, device: Any) -> dict[str, Any]:
    """``{"do": "run", "save": FILE}``, or ``count`` or ``ceiling`` in the place of ``run``."""
    from safetensors.torch import save_file
    from sdxl_kernels.graphs import unrecorded

    from sdxl_cli.bench.ceiling import gemm_rate
    from sdxl_cli.bench.counting import count
    from sdxl_cli.bench.memory import peak_memory
    from sdxl_cli.bench.timing import timed
    from sdxl_cli.generation.device import DTYPES

    if order["do"] == "ceiling":
        return {"rate": gemm_rate(DTYPES[order["dtype"]], device)}
    result: list[Any] = []

    def once() -> None:
        result[:] = [work()]

    if order["do"] == "count":
        with unrecorded():
            counted = count(once)
        found: dict[str, Any] = {"flops": counted.flops, "ops": counted.ops, "waits": counted.waits}
    else:
        with peak_memory(device) as memory:
            sample = timed(once, device)
        found = {"seconds": sample.seconds, "cpu": sample.cpu_seconds, "memory": _bytes(memory)}
    if path := order.get("save"):
        save_file({"out": result[0].detach().cpu().contiguous()}, Path(path))
    return found


def _bytes(memory: Any) -> dict[str, int]:
    return {name: getattr(memory, name) for name in ("before", "most", "own_before", "own", "reserved")}


if __name__ == "__main__":
    main()
