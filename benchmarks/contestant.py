"""One side of a comparison in a process of its own: python benchmarks/contestant.py SIDE VARIANT JOB.

Loads what the job needs, then does it once for every line on stdin, and says what it took in a line of JSON on stdout.
While the other side runs, it waits for a line. ``harness`` speaks to it.
"""

from __future__ import annotations

import gc
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
Answer = dict[str, Any]


def main() -> None:
    side, variant, text = sys.argv[1:4]

    import torch
    from child import serve
    from job import Job

    from sdxl_cli.bench.machine import machine
    from sdxl_cli.generation.device import compute_as_told

    job = Job.from_text(text)
    device = torch.device(job.device)
    torch.set_num_threads(job.threads)
    compute_as_told(torch.float32)
    with torch.inference_mode():
        contest = Contest(import_module(f"side_{side}"), variant, device)

        def first() -> Answer:
            found = contest.build(text)
            return {
                **found,
                "seconds": time.perf_counter() - STARTED,
                "machine": machine(device, contest.packages),
            }

        serve(contest.obey, first)


class Contest:
    """What the process has loaded, and what its orders do."""

    def __init__(self, module: Any, variant: str, device: Any) -> None:
        self.module, self.variant, self.device = module, variant, device
        self.packages: tuple[str, ...] = module.PACKAGES
        self.work: Any = None

    def obey(self, order: Answer) -> Answer:
        """``{"do": "run", "save": FILE, "steps": N}``, where the last two may be left out; or another method's name."""
        return getattr(self, order.pop("do"))(**order)

    def build(self, job: str) -> Answer:
        """Forget what was loaded, and load what this job needs."""
        import torch
        from job import Job

        from sdxl_cli.bench.memory import peak_memory

        self.work = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with peak_memory(self.device) as memory:
            self.work = self.module.build(Job.from_text(job), self.variant)
        return {"loading": _bytes(memory)}

    def ceiling(self, dtype: str) -> Answer:
        """The rate of matrix products here."""
        from sdxl_cli.bench.ceiling import gemm_rate
        from sdxl_cli.generation.device import DTYPES

        return {"rate": gemm_rate(DTYPES[dtype], self.device)}

    def run(self, steps: int | None = None, save: str = "") -> Answer:
        """Do the job once; a picture also with other steps than the job's."""
        from safetensors.torch import save_file

        from sdxl_cli.bench.memory import peak_memory
        from sdxl_cli.bench.timing import timed

        result: list[Any] = []
        work = self.work if steps is None else partial(self.work, steps)
        with peak_memory(self.device) as memory:
            sample = timed(lambda: result.append(work()), self.device)
        if save:
            save_file({"out": result[0].detach().cpu().contiguous()}, Path(save))
        return {"seconds": sample.seconds, "cpu": sample.cpu_seconds, "memory": _bytes(memory)}

    def count(self, steps: int | None = None) -> Answer:
        """Do it and count; nothing recorded is replayed meanwhile."""
        from sdxl_kernels.graphs import unrecorded

        from sdxl_cli.bench.counting import count

        with unrecorded():
            counted = count(self.work if steps is None else partial(self.work, steps))
        return {"flops": counted.flops, "ops": counted.ops, "waits": counted.waits}


def _bytes(memory: Any) -> dict[str, int]:
    return {name: getattr(memory, name) for name in ("before", "most", "own_before", "own", "reserved")}


if __name__ == "__main__":
    main()
