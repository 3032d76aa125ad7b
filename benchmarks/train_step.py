"""A training step beside that of diffusers' train_text_to_image_sdxl.py, on the CPU, in fp32, from the same weights.

python benchmarks/train_step.py [--size 256] [--batch 2] [--rounds 12] [--threads 1] [--memory none]

Both train a U-Net of the released structure at a fifth of its width (103 M parameters) on the same latents, features of
text, noise and noise levels, each in a process of its own. A step is the U-Net forward and backward, the gradient's
length limited, AdamW, and the average of the weights; features and latents are cached on both sides. Ours is the loop
of ``sdxl train-unet``; theirs is written out below as the script has it. Steps are taken in turns, A B B A; the losses
of every step must agree, or there is no result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sdxl_cli.checkpoint.layouts import unet_to_diffusers
from sdxl_cli.data.loader import Batch, Latents
from sdxl_cli.model.conditioning import TextFeatures
from sdxl_cli.model.config import BASE, TextTowerConfig, UNetConfig
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.config import LoopConfig, OptimizerConfig, UNetTrainConfig
from sdxl_cli.training.draws import streams
from sdxl_cli.training.loop import Run
from sdxl_cli.training.recompute import recompute
from sdxl_cli.training.unet_task import UNetTask

RATE, DECAY, NORM, WARM = 1e-4, 0.9999, 1.0, 2
AGREE = 2e-3
"""Relative difference of losses that rounding makes in the few steps of a run, and a mistake does not."""
TOWER = TextTowerConfig(width=64, layers=1, heads=1, activation="gelu", embed_dim=64)
MODEL = replace(
    BASE,
    unet=UNetConfig(model_channels=64, num_head_channels=64, context_dim=128, adm_in_channels=64 + 6 * 256),
    clip_l=TOWER,
    big_g=TOWER,
)


class Given:
    """The same batch at every step."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.latent, self.text = tensors["latent"], TextFeatures(tensors["crossattn"], tensors["pooled"])

    def batch(self, step: int) -> Batch:
        count, _, height, width = self.latent.shape
        sizes = [(8 * height, 8 * width)] * count
        scaled = self.latent / MODEL.vae.scale_factor
        return Batch(
            images=None,
            latents=Latents(scaled, torch.full_like(scaled, -60.0)),
            captions=[""] * count,
            original_size=sizes,
            crop_top_left=[(0, 0)] * count,
            target_size=sizes,
            aesthetic_score=[6.0] * count,
            ids=[str(number) for number in range(count)],
            weight=torch.ones(count),
            text=self.text,
        )


def ours(
    tensors: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], memory: Any
) -> Callable[[int], float]:
    model = SDXL(MODEL, ("unet", "text"))
    model.unet.load_state_dict(weights)
    model.requires_grad_(False).unet.requires_grad_(True)
    model.to(memory_format=torch.channels_last).train()
    recompute(model.unet, memory)
    loop = LoopConfig(
        ema_decay=DECAY,
        dtype="fp32",
        device="cpu",
        optimizer=OptimizerConfig(learning_rate=RATE, max_grad_norm=NORM, schedule="constant"),
    )
    config = UNetTrainConfig(text_dropout=0.0, memory="none", loop=loop)
    given = Given(tensors)
    empty = TextFeatures(torch.zeros_like(given.text.crossattn[:1]), torch.zeros_like(given.text.pooled[:1]))
    task = UNetTask(model, given, lambda captions: (torch.empty(0), torch.empty(0)), config, empty)
    run = Run(task, loop, Path(tempfile.mkdtemp()), {})
    return lambda index: run.advance(index)["loss"]


def theirs(
    tensors: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], memory: Any
) -> Callable[[int], float]:
    """train_text_to_image_sdxl.py from ``for step, batch in enumerate(train_dataloader)`` on, without accelerate."""
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    unet = UNet2DConditionModel(
        block_out_channels=[64, 128, 256],
        layers_per_block=2,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[1, 2, 4],
        cross_attention_dim=MODEL.unet.context_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=MODEL.unet.adm_in_channels,
    )
    plan = unet_to_diffusers(weights, MODEL.unet)
    unet.load_state_dict({name: weights[source.keys[0]].clone() for name, source in plan.items()})
    unet.train()
    if memory != "none":
        unet.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    average = EMAModel(unet.parameters(), decay=DECAY)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    latent = tensors["latent"]
    height, width = (8 * side for side in latent.shape[2:])
    ids = torch.tensor([[height, width, 0, 0, height, width]] * len(latent))

    def step(index: int) -> float:
        noise, timesteps = tensors[f"noise.{index}"], tensors[f"steps.{index}"]
        noisy = scheduler.add_noise(latent, noise, timesteps)
        added = {"time_ids": ids, "text_embeds": tensors["pooled"]}
        output = unet(noisy, timesteps, tensors["crossattn"], added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(output.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), NORM)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        return float(loss.detach())

    return step


def given_tensors(size: int, batch: int, steps: int) -> dict[str, torch.Tensor]:
    """Latents and features, and of every step the noise and its levels as our loop draws them."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, size // 8, size // 8)
    found = {
        "latent": torch.randn(batch, *shape, generator=generator),
        "crossattn": torch.randn(batch, 77, MODEL.unet.context_dim, generator=generator),
        "pooled": torch.randn(batch, MODEL.big_g.embed_dim, generator=generator),
    }
    for index in range(steps):
        levels, noises = [], []
        for stream in streams(torch.Generator().manual_seed(index), range(batch)):
            torch.randn(1, *shape, generator=stream)
            levels.append(torch.randint(0, 1000, (1,), generator=stream))
            noises.append(torch.randn(1, *shape, generator=stream))
        found |= {f"noise.{index}": torch.cat(noises), f"steps.{index}": torch.cat(levels)}
    return found


def serve(side: str, folder: Path, threads: int, memory: str) -> None:
    """Make a step for every line that comes in, and say what it took."""
    torch.set_num_threads(threads)
    build = ours if side == "ours" else theirs
    step = build(load_file(folder / "given.safetensors"), load_file(folder / "weights.safetensors"), memory)
    for line in sys.stdin:
        wall, work = time.perf_counter(), time.process_time()
        loss = step(int(line))
        print(json.dumps([time.perf_counter() - wall, time.process_time() - work, loss]), flush=True)


def interval(ratios: list[float]) -> tuple[float, float]:
    """Where the median of the ratios is, at 95 %, by drawing them again."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(ratios, dtype=torch.float64)
    picks = torch.randint(len(ratios), (2000, len(ratios)), generator=generator)
    medians = values[picks].median(dim=1).values
    low, high = (float(medians.quantile(q)) for q in (0.025, 0.975))
    return low, high


def compare(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    steps = WARM + args.rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = SDXL(MODEL, ("unet",)).unet.state_dict()
        save_file(weights, folder / "weights.safetensors")
        save_file(given_tensors(args.size, args.batch, steps), folder / "given.safetensors")
        options = ["--threads", str(args.threads), "--memory", args.memory]
        children = {
            side: subprocess.Popen(
                [sys.executable, __file__, "--serve", side, str(folder), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
            )
            for side in ("ours", "theirs")
        }
        times: dict[str, list[float]] = {side: [] for side in children}
        for index in range(steps):
            losses = {}
            for side in sorted(children, reverse=bool(index % 2)):
                child = children[side]
                assert child.stdin
                assert child.stdout
                print(index, file=child.stdin, flush=True)
                wall, work, losses[side] = json.loads(child.stdout.readline())
                if index >= WARM:
                    times[side].append(work if args.threads == 1 else wall)
            if abs(losses["ours"] / losses["theirs"] - 1) > AGREE:
                sys.exit(f"step {index}: losses {losses} differ; this is not the same work")
        for child in children.values():
            assert child.stdin
            child.stdin.close()
            child.wait()
    report(times, args, sum(w.numel() for w in weights.values()))


def report(times: dict[str, list[float]], args: argparse.Namespace, parameters: int) -> None:
    kind = "CPU" if args.threads == 1 else "wall"
    print(f"torch {torch.__version__}, {args.threads} threads, fp32, {parameters / 1e6:.0f} M parameters")
    print(
        f"{args.size}x{args.size}, batch {args.batch}, recomputed: {args.memory}; {args.rounds} steps in turns"
    )
    for side, found in times.items():
        print(
            f"{side:7} {statistics.median(found):8.3f} s of {kind} time a step, {min(found):.3f} ... {max(found):.3f}"
        )
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    low, high = interval(ratios)
    print(
        f"ratio   {statistics.median(ratios):8.2f}, 95 %: {low:.2f} ... {high:.2f}; losses agree within {AGREE}"
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
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], Path(args.serve[1]), args.threads, args.memory)
    else:
        compare(args)


if __name__ == "__main__":
    main()
