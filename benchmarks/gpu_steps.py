"""A denoising step and decoding on a GPU: eager, recorded, compiled; against diffusers on the same weights.

python benchmarks/gpu_steps.py [--size 1024] [--batch 1] [--steps 30] [--compile] [--json FILE]

Weights are random, of the released size, in bf16; inputs are random numbers and never zeros. Every way gets the same
latents, texts and sizes, is warmed up (which is a column of its own), then timed in turns; the results of all are
compared with single precision. The last column is the share of the rate of matrix products measured in this process.
``--small``, ``--device cpu`` and ``--dtype fp32`` are for trying out the script.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rows import missing
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sdxl_cli.bench.machine import machine
from sdxl_cli.checkpoint.diffusers_config import unet_json
from sdxl_cli.checkpoint.layouts import unet_to_diffusers
from sdxl_cli.generation.device import compute_as_told
from sdxl_cli.generation.remember import RecordedSteps, Remembering
from sdxl_cli.generation.weights import channels_last_pays, compute_on_gpu
from sdxl_cli.model import vae_strips
from sdxl_cli.model.config import BASE, ModelConfig, UNetConfig, VAEConfig
from sdxl_cli.model.embedding import sinusoidal
from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder

SMALL = replace(
    BASE,
    unet=UNetConfig(
        model_channels=64,
        transformer_depth=(0, 1, 2),
        transformer_depth_middle=2,
    ),
    vae=VAEConfig(channels=32, norm_groups=8),
)
"""For trying out the script."""
ROUNDS = 5
TIMESTEP = 500


class Bench:
    """Where it runs, and what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.args = torch.device(args.device), args
        self.dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        self.config: ModelConfig = SMALL if args.small else BASE
        self.rows: list[dict[str, Any]] = []
        self.flops: dict[tuple[str, str], int] = {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - start) / times

    def peak(self) -> float:
        """What torch holds; recorded steps keep their memory where counters of tensors do not see it."""
        return torch.cuda.max_memory_reserved() / 2**30 if self.device.type == "cuda" else 0.0

    def matrix_rate(self) -> float:
        side = 8192 if self.device.type == "cuda" else 512
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        torch.mm(a, b)
        return 2 * side**3 / min(self.seconds(lambda: torch.mm(a, b), 10) for _ in range(3))

    def compare(self, what: str, ways: dict[str, Callable[[], Tensor]], exact: Tensor, times: int) -> None:
        """Time the ways in turns; the arithmetic is what each does, counted."""
        first, found = {}, {way: [] for way in ways}
        for way, work in ways.items():
            first[way] = self.seconds(work)
        for _ in range(ROUNDS):
            for way, work in ways.items():
                found[way].append(self.seconds(work, times))
        rate = self.matrix_rate()
        for way, work in ways.items():
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            result, peak = work(), self.peak()
            typical = statistics.median(found[way])
            flops = self.flops.get((what, way)) or self.flops[what, "ours, eager"]
            self.rows.append({
                "what": what, "way": way, "ms": 1e3 * typical, "spread_ms": 1e3 * (max(found[way]) - min(found[way])),
                "first_s": first[way], "tflop": flops / 1e12, "of_matrix_rate": flops / typical / rate,
                "peak_gib": peak, "error": float((result.float().cpu() - exact).norm() / exact.norm()),
            })  # fmt: skip
            print(
                "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in self.rows[-1].items()
                )
            )


@contextmanager
def counted(bench: Bench, what: str, way: str) -> Iterator[None]:
    with FlopCounterMode(display=False) as seen:
        yield
    bench.flops[what, way] = seen.get_total_flops()


def inputs(bench: Bench, config: UNetConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, texts of which the first half are zeros as the released base has them, and vectors."""
    batch, side = bench.args.batch, bench.args.size // 8
    texts = torch.randn(2 * batch, 77, config.context_dim)
    texts[:batch] = 0.0
    pooled = torch.randn(2 * batch, config.adm_in_channels - 6 * bench.config.scalar_dim)
    sizes = sinusoidal(torch.full((12 * batch,), float(bench.args.size)), bench.config.scalar_dim)
    vectors = torch.cat([pooled, sizes.view(2 * batch, -1)], dim=1)
    return torch.randn(batch, 4, side, side), torch.full((2 * batch,), TIMESTEP), texts, vectors


def steps(bench: Bench) -> None:
    config = bench.config.unet
    with bench.device:
        unet = UNet(config).eval().requires_grad_(False)
    x, t, texts, vectors = inputs(bench, config)
    moved = [value.to(bench.device) for value in (x, t, texts, vectors)]
    exact = unet(torch.cat([moved[0], moved[0]]), *moved[1:]).cpu()
    unet = unet.to(bench.dtype)
    x, texts, vectors = (moved[place].to(bench.dtype) for place in (0, 2, 3))
    t = moved[1]
    prepared = unet.prepare(texts, vectors)
    shifts = unet.shifts(t[None], prepared)[0]
    with counted(bench, "step", "ours, eager"):
        unet.step(x, shifts, prepared)
    # weights of their own, laid out as a GPU likes them: diffusers' are those of the other
    ours = copy.deepcopy(unet)
    compute_on_gpu(ours, bench.device, bench.dtype)
    told = ours.prepare(texts, vectors)
    ways: dict[str, Callable[[], Tensor]] = {"ours, eager": lambda: ours.step(x, shifts, told)}
    if bench.device.type == "cuda":
        recorded = Remembering(ours, RecordedSteps(ours))
        ways["ours, recorded"] = lambda: recorded(x, TIMESTEP, texts, vectors)
    ways |= peers(bench, unet, (x, t, texts, vectors))
    if bench.args.compile:
        compiled = UNet(config).eval().requires_grad_(False).to(bench.device, bench.dtype)
        compiled.load_state_dict(unet.state_dict())
        compiled.compile_blocks()
        known = compiled.prepare(texts, vectors)
        ways["ours, compiled"] = lambda: compiled.step(x, shifts, known)
    bench.compare("step", ways, exact, times=3)


def peers(bench: Bench, unet: UNet, given: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """diffusers as it is by default and as fast as its settings make it, with our weights."""
    if gone := missing("diffusers"):
        print(f"{gone}: no rows of it", flush=True)
        return {}
    from diffusers import UNet2DConditionModel

    x, t, texts, vectors = given
    config = bench.config.unet
    doubled, pooled = torch.cat([x, x]), config.adm_in_channels - 6 * bench.config.scalar_dim
    state = unet.state_dict()
    theirs = {name: state[source.keys[0]] for name, source in unet_to_diffusers(state, config).items()}

    def built(*, tuned: bool) -> Any:
        with torch.device("meta"):
            model = UNet2DConditionModel.from_config(unet_json(bench.config))
        # tuning changes a model: each way has weights of its own
        model.load_state_dict({k: v.clone() for k, v in theirs.items()} if tuned else theirs, assign=True)
        if tuned:
            model.fuse_qkv_projections()
            model.to(memory_format=torch.channels_last)
        return model.eval()

    sizes = torch.full((len(vectors), 6), float(bench.args.size), device=bench.device)
    added = {"text_embeds": vectors[:, :pooled], "time_ids": sizes}

    def call(network: Any) -> Callable[[], Tensor]:
        return lambda: network(doubled, t, encoder_hidden_states=texts, added_cond_kwargs=added).sample

    plain, tuned = built(tuned=False), built(tuned=True)
    ways = {"diffusers, eager": call(plain), "diffusers, tuned": call(tuned)}
    for way, work in ways.items():
        with counted(bench, "step", way):
            work()
    if bench.args.compile:
        bench.flops["step", "diffusers, compiled"] = bench.flops["step", "diffusers, tuned"]
        ways["diffusers, compiled"] = call(torch.compile(built(tuned=True), mode="max-autotune"))
    return ways


def decoding(bench: Bench) -> None:
    with bench.device:
        vae = Autoencoder(bench.config.vae).eval().requires_grad_(False)
    z = torch.randn(1, 4, bench.args.size // 8, bench.args.size // 8).to(bench.device)
    exact = vae.decode(z).cpu()
    half = Autoencoder(bench.config.vae).eval().requires_grad_(False).to(bench.device, bench.dtype)
    half.load_state_dict(vae.state_dict())
    if channels_last_pays(bench.device, bench.dtype):
        half.lay_channels_last()
    with counted(bench, "decoding", "ours, eager"):
        vae.decode(z)
    with counted(bench, "decoding", "ours, strips"):
        vae_strips.decode(vae, z)
    ways = {
        "ours, eager": lambda: half.decode(z.to(bench.dtype)),
        "ours, strips": lambda: vae_strips.decode(half, z.to(bench.dtype)),
        "ours, fp32": lambda: vae.decode(z),
    }
    bench.compare("decoding", ways, exact, times=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30, help="of which a whole picture's time is reckoned")
    parser.add_argument("--compile", action="store_true", help="compiled ways too: minutes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    bench = Bench(parser.parse_args())
    torch.manual_seed(0)
    compute_as_told(torch.float32)  # what is exact is
    with torch.inference_mode():
        steps(bench)
        decoding(bench)
    ours = {row["way"]: row["ms"] for row in bench.rows if row["what"] == "step"}
    best = min(value for way, value in ours.items() if way.startswith("ours"))
    decode = next(row["ms"] for row in bench.rows if row["what"] == "decoding")
    print(f"{bench.args.steps} steps and decoding: {(bench.args.steps * best + decode) / 1e3:.2f} s")
    if bench.args.json:
        found = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            **machine(bench.device, ("diffusers",)),
            "rows": bench.rows,
        }
        bench.args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
