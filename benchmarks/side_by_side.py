"""sdxl beside diffusers: the same weights, the same inputs, in turns, each in a process of its own.

python benchmarks/side_by_side.py                              the tiny size, half a minute: a trial
python benchmarks/side_by_side.py --model base --weights W \\
    --jobs unet --size 1024x1024 --rounds 2 --threads 2        the released size, random weights in fp32 (written once)

A row is seconds (median, of how many rounds), smallest … largest, CPU seconds, how many times longer than ours with
the interval over the rounds (95 % by bootstrap from 6 rounds on, else the smallest and the largest), counted
operations, memory, and how far the result is from diffusers' in a finer precision, computed in the same run. Without
that (--reference none) the difference is from ours.

Peak GiB is the most that was resident, own GiB of it without the file's pages, which both sides share.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from harness import OURS, compare, flags, heading, publish, table, weights_of
from job import Job, Kind
from random_folder import PARTS
from rows import missing

from sdxl_cli.generation.device import DTYPES
from sdxl_cli.generation.sizes import parse_size

JOBS: tuple[Kind, ...] = ("unet", "decode", "encode", "text", "image")
NEEDS: dict[Kind, tuple[str, ...]] = {
    "unet": ("unet",), "decode": ("vae",), "encode": ("vae",), "text": ("text",), "image": ("unet", "vae", "text"),
}  # fmt: skip
FINER = {"fp32": "fp64", "bf16": "fp32", "fp16": "fp32"}
LARGEST_IN_DOUBLE = 1 << 31
"""Bytes of weights up to which fp64 is the reference by itself."""


def arguments() -> argparse.Namespace:
    parser = flags(__doc__, rounds=6)
    parser.add_argument("--jobs", default="unet,decode,encode,text,image", help=f"of {', '.join(JOBS)}")
    parser.add_argument("--peers", default="default,best", help="of default, best, tiling, compiled")
    parser.add_argument("--ours", default="", help="variants of ours beside it: no-winograd")
    parser.add_argument("--size", default="", help="WxH; 128x128 for tiny, 1024x1024 for base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="of a whole picture")
    parser.add_argument("--negative", action="store_true", help="with features for the negative prompt")
    parser.add_argument("--reference", choices=("auto", "none", "fp64", "fp32"), default="auto")
    parser.add_argument(
        "--no-count", action="store_true", help="do not count operations: one run less of each side"
    )
    parser.add_argument(
        "--alone", action="store_true", help="one process at a time, loaded anew for each round"
    )
    parser.add_argument("--title", default="")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    jobs = args.jobs.split(",")
    if wrong := set(jobs) - set(JOBS):
        sys.exit(f"--jobs {', '.join(wrong)}: there are {', '.join(JOBS)}")
    folder = weights_of(args)
    height, width = parse_size(args.size or ("128x128" if args.model == "tiny" else "1024x1024"), "--size")
    names = [OURS, *(f"{OURS}-{v}" for v in args.ours.split(",") if v)]
    if gone := missing("diffusers"):
        print(f"{gone}: no rows of it, and nothing is compared with it", flush=True)
        args.peers, args.reference = "", "none"
    names += [f"diffusers-{peer}" for peer in args.peers.split(",") if peer]
    lines: list[str] = []
    for kind in jobs:
        job = Job(
            folder=str(folder), kind=kind, height=height, width=width, batch=args.batch, steps=args.steps,
            dtype=args.dtype, device=args.device, threads=args.threads, negative=args.negative,
        )  # fmt: skip
        found = compare(
            job,
            names,
            args.rounds,
            counts=not args.no_count,
            reference=_reference(args, kind, folder),
            alone=args.alone,
        )
        if not lines:
            machine = {k: v for result in found.results for k, v in result.loaded["machine"].items()}
            title = args.title or f"{args.model} size, random weights, beside diffusers"
            lines = heading(machine, title)
        lines += [*table(found), ""]
    publish(lines, write=args.write)


def _reference(args: argparse.Namespace, kind: Kind, folder: Path) -> str:
    """The precision that diffusers is run in to say what is right."""
    if args.reference != "auto":
        return "" if args.reference == "none" else str(args.reference)
    finer = FINER[args.dtype]
    files = [
        path for part in NEEDS[kind] for name in PARTS[part] for path in (folder / name).glob("*.safetensors")
    ]
    size = sum(path.stat().st_size for path in files) * torch.float64.itemsize // DTYPES[args.dtype].itemsize
    return "" if finer == "fp64" and size > LARGEST_IN_DOUBLE else finer


if __name__ == "__main__":
    main()
