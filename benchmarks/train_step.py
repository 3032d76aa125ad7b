"""A training step beside that of diffusers' train_text_to_image_sdxl.py, on the CPU, in fp32, from the same weights.

python benchmarks/train_step.py [--size 256] [--batch 2] [--rounds 12] [--threads 1] [--memory none]

Both train a U-Net of the released structure at a fifth of its width (94 M parameters) on the same latents, features of
text, noise and noise levels, each in a process of its own. A step is the U-Net forward and backward, the gradient's
length limited, AdamW, and the average of the weights; features and latents are cached on both sides. Ours is the loop
of ``sdxl train-unet``; both are in ``train_sides.py``. Steps are taken in turns, A B B A; the losses of every step must
agree, or there is no result. ``gpu_training.py`` is the same on a GPU, at the released size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace

import torch
from child import Answer, Child, serve
from rows import missing
from train_sides import Data, Place, Way, build

from sdxl_cli.bench.timing import ratio, timed
from sdxl_cli.model.config import BASE, TextTowerConfig, UNetConfig
from sdxl_cli.model.sdxl import SDXL

RATE, DECAY, WARM = 1e-4, 0.9999, 2
AGREE = 2e-3
"""Relative difference of losses that rounding makes in the few steps of a run, and a mistake does not."""
TOWER = TextTowerConfig(width=64, layers=1, heads=1, activation="gelu", embed_dim=64)
MODEL = replace(
    BASE,
    unet=UNetConfig(model_channels=64, num_head_channels=64, context_dim=128, adm_in_channels=64 + 6 * 256),
    clip_l=TOWER,
    big_g=TOWER,
)
SIDES = ("sdxl", "diffusers")


def serve_side(args: argparse.Namespace) -> None:
    """Make a step for every order, and say what it took."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weights = SDXL(MODEL, ("unet",)).unet.state_dict()
    way = Way(side=args.serve, memory=args.memory, fused_step=False)
    side = build(MODEL, weights, way, Place(rate=RATE, ema_decay=DECAY), Data(MODEL, args.size, args.batch))

    def step(order: Answer) -> Answer:
        losses: list[float] = []
        side.prepare(order["index"])
        sample = timed(lambda: losses.append(side.step(order["index"])), torch.device("cpu"))
        return {"wall": sample.seconds, "cpu": sample.cpu_seconds, "loss": losses[0]}

    serve(step, lambda: {"parameters": sum(w.numel() for w in weights.values())})


def compare(args: argparse.Namespace) -> None:
    if gone := missing("diffusers"):
        sys.exit(f"{gone}, and this is a comparison with it; gpu_training.py also runs without")
    options = ["--threads", str(args.threads), "--memory", args.memory]
    options += ["--size", str(args.size), "--batch", str(args.batch)]
    ready = {"OMP_NUM_THREADS": str(args.threads)}
    children = {side: Child(side, [__file__, "--serve", side, *options], ready) for side in SIDES}
    parameters = [child.answer()["parameters"] for child in children.values()]
    times: dict[str, list[float]] = {side: [] for side in children}
    for index in range(WARM + args.rounds):
        losses = {}
        for side in SIDES[:: -1 if index % 2 else 1]:
            found = children[side].ask("step", index=index)
            losses[side] = found["loss"]
            if index >= WARM:
                times[side].append(found["cpu" if args.threads == 1 else "wall"])
        if abs(losses["sdxl"] / losses["diffusers"] - 1) > AGREE:
            sys.exit(f"step {index}: losses {losses} differ; this is not the same work")
    for child in children.values():
        child.close()
    report(times, args, parameters[0])


def report(times: dict[str, list[float]], args: argparse.Namespace, parameters: int) -> None:
    kind = "CPU" if args.threads == 1 else "wall"
    print(f"torch {torch.__version__}, {args.threads} threads, fp32, {parameters / 1e6:.0f} M parameters")
    print(
        f"{args.size}x{args.size}, batch {args.batch}, recomputed: {args.memory}; {args.rounds} steps in turns"
    )
    for side, found in times.items():
        print(
            f"{side:10} {statistics.median(found):8.3f} s of {kind} time a step, "
            f"{min(found):.3f} ... {max(found):.3f}"
        )
    found = ratio(times["sdxl"], times["diffusers"])
    print(
        f"ratio      {found.median:8.2f}, {found.low:.2f} ... {found.high:.2f}; losses agree within {AGREE}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", default="none", help="of ours; theirs checkpoints all or nothing")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_side(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
