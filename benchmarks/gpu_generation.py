"""Pictures on a GPU beside diffusers: the released size, bf16, random weights. A table, and JSON; below 8 minutes.

python benchmarks/gpu_generation.py --json out.json              against diffusers' default and best eager settings
python benchmarks/gpu_generation.py --compiled --json out.json   against torch.compile, max-autotune

Rows: a step of the U-Net for 1 and 8 pictures, decoding, whole pictures of 30 and 50 steps; with the encoders
released before the U-Net comes (``sdxl-med``). Memory is the most that torch had allocated. Needs a CUDA device; the
side on the CPU is the same code as in ``side_by_side.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import OURS, Comparison, compare, heading, publish, table
from job import Job, Kind
from random_folder import write_folder

from sdxl_cli.generation.device import DTYPES
from sdxl_cli.model.config import CONFIGS

ROWS: tuple[tuple[Kind, int, int, int], ...] = (
    ("unet", 1, 1, 20), ("unet", 8, 1, 6), ("decode", 1, 1, 10), ("image", 1, 30, 6), ("image", 1, 50, 4),
)  # fmt: skip
"""Job, pictures at once, steps, rounds."""
COMPILED: tuple[tuple[Kind, int, int, int], ...] = (("image", 1, 30, 6),)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("tiny", "base"), default="base")
    parser.add_argument(
        "--weights", type=Path, help="folder of the random weights; made where they are missing"
    )
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="add the tables to RESULTS.md")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; nothing was run")
    folder = args.weights or Path.home() / ".cache" / "sdxl" / "benchmarks" / f"{args.model}-{args.dtype}"
    write_folder(folder, CONFIGS[args.model], DTYPES[args.dtype])
    found = [_row(args, folder, row) for row in (COMPILED if args.compiled else ROWS)]
    lines = heading(_machine(found), f"pictures on a GPU, {args.model} size, random weights")
    publish([*lines, *(line for one in found for line in [*table(one), ""])], write=args.write)
    if args.json:
        args.json.write_text(json.dumps([_json(one) for one in found], indent=1) + "\n", "utf-8")


def _row(args: argparse.Namespace, folder: Path, row: tuple[Kind, int, int, int]) -> Comparison:
    kind, batch, steps, rounds = row
    job = Job(
        folder=str(folder), kind=kind, height=args.side, width=args.side, batch=batch, steps=steps,
        dtype=args.dtype, device=args.device, threads=torch.get_num_threads(),
    )  # fmt: skip
    peers = ["diffusers-compiled"] if args.compiled else ["diffusers-default", "diffusers-best"]
    ours = [OURS, f"{OURS}-med"] if kind == "image" else [OURS]
    # pictures of random weights magnify rounding over the steps: only single networks are held against fp32
    return compare(
        job, [*ours, *peers], rounds, counts=kind != "image", reference="" if kind == "image" else "fp32"
    )


def _machine(found: list[Comparison]) -> dict[str, Any]:
    return {k: v for one in found for result in one.results for k, v in result.loaded["machine"].items()}


def _json(one: Comparison) -> dict[str, Any]:
    ratios = {result.name: asdict(one.ratio(result)) for result in one.results[1:]}
    return {**asdict(one), "slower_than_ours": ratios}


if __name__ == "__main__":
    main()
