"""From nothing to the first denoising step: imports, weights, text encoders, one step. In turns, each a new process.

python benchmarks/cold_start.py [--model tiny] [--weights FOLDER] [--rounds 5] [--threads 1] [--write]

Pictures are small (``--size``), so that what is timed is the start and not the arithmetic of a step. The files are in
memory already (page cache): they are read once before. Two rows more: ``sdxl --help``, and importing the peer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from harness import flags, heading, publish, said, weights_of
from job import PROMPT
from random_folder import PARTS
from rows import missing

from sdxl_cli.bench.machine import machine
from sdxl_cli.bench.timing import ratio, spread

DONE = """
import os, sys
def done(*args, **more):
    print("MODULES", len(sys.modules), flush=True)
    os._exit(0)
"""
"""Says how much was imported and ends the process: what comes after is not timed."""
PROGRAMS = {
    "sdxl generate, first step": DONE
    + """
from sdxl_cli import cli
from sdxl_cli.generation import pipeline
pipeline.step = done
cli.run(["generate", PROMPT, "--model", FOLDER, "--size", SIZE, "--steps", "2", "--dtype", DTYPE, "--device", DEVICE,
         "--seed", "0", "-o", "none.png", "--quiet"])
sys.exit("no step was made")
""",
    "diffusers, first step": DONE
    + """
import torch
from diffusers import StableDiffusionXLPipeline
kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[DTYPE]
pipe = StableDiffusionXLPipeline.from_pretrained(FOLDER, torch_dtype=kind).to(DEVICE)
width, height = map(int, SIZE.split("x"))
pipe(PROMPT, width=width, height=height, num_inference_steps=2, callback_on_step_end=done)
sys.exit("no step was made")
""",
    "sdxl --help": DONE + "from sdxl_cli import cli\ncli.run(['--help'])\ndone()",
    "import of diffusers' pipeline": DONE + "from diffusers import StableDiffusionXLPipeline\ndone()",
}
PAIRS = (
    ("sdxl generate, first step", "diffusers, first step"),
    ("sdxl --help", "import of diffusers' pipeline"),
)


def started(program: str, values: dict[str, str], threads: int) -> tuple[float, float, int]:
    """Seconds and CPU seconds until it says that it is done, and the modules it has imported."""
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()) + program
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-c", text],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | own | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.stdout
        said_last = child.stdout.read().splitlines()[-1:]
        seconds = time.perf_counter() - begun
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = status
    if status or not said_last or not said_last[0].startswith("MODULES"):
        sys.exit(f"a program ended with status {status}; what it said is above")
    return seconds, usage.ru_utime + usage.ru_stime, int(said_last[0].split()[1])


def main() -> None:
    args = arguments()
    folder = weights_of(args)
    for name in (name for names in PARTS.values() for name in names):
        for path in (folder / name).glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
    values = {
        "FOLDER": str(folder.absolute()), "SIZE": args.size, "DTYPE": args.dtype, "DEVICE": args.device,
        "PROMPT": PROMPT,
    }  # fmt: skip
    gone = missing("diffusers", "accelerate")
    if gone:
        print(f"{gone}: no rows of diffusers", flush=True)
    theirs = {theirs for _, theirs in PAIRS}
    found: dict[str, list[tuple[float, float, int]]] = {
        name: [] for name in PROGRAMS if not (gone and name in theirs)
    }
    for name in found:  # compiles what Python has not compiled yet
        started(PROGRAMS[name], values, args.threads)
    for number in range(args.rounds):
        for name in list(found)[:: -1 if number % 2 else 1]:
            found[name].append(started(PROGRAMS[name], values, args.threads))
            print(f"round {number + 1}: {name} {found[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
    device = torch.device(args.device)
    lines = heading(
        machine(device, ("diffusers", "transformers", "accelerate")), f"cold start, {args.model} size"
    )
    lines += [
        "| program | seconds | from … to | CPU s | of the peer's seconds | of its CPU s | modules |",
        "|---|---|---|---|---|---|---|",
    ]
    peers = dict(PAIRS)
    for name, runs in found.items():
        seconds, cpu = spread([run[0] for run in runs]), spread([run[1] for run in runs])
        peer = found.get(peers.get(name, ""), [])
        shares = ["", ""]
        if peer:
            shares = [said(ratio([run[i] for run in peer], [run[i] for run in runs])) for i in (0, 1)]
        lines.append(
            f"| {name} | {seconds.median:.2f} ({seconds.count}) | {seconds.low:.2f} … {seconds.high:.2f} "
            f"| {cpu.median:.2f} | {shares[0]} | {shares[1]} | {runs[0][2]} |"
        )
    publish([*lines, ""], write=args.write)


def arguments() -> argparse.Namespace:
    parser = flags(__doc__, rounds=5)
    parser.add_argument("--size", default="64x64", help="WxH")
    return parser.parse_args()


if __name__ == "__main__":
    main()
