"""The rewrites for GPUs at the sizes of SDXL, each against what it replaces. A table, and JSON after every row.

python benchmarks/gpu_kernels.py [norm attention upsample qkv conv] [--json FILE] [--dtype bf16] [--rounds 7]
python benchmarks/gpu_kernels.py --device cpu --dtype fp32 --shrink 16 --rounds 1

Norm: the fused group norm and SiLU against torch's, with channels first and last. Attention: each of torch's kernels,
and which one the rule takes. Upsample: four 2x2 convolutions against doubling and a 3x3 one. QKV: one product against
three. Conv: channels last against first. Sizes are those of the U-Net at 1024² with guidance, and of the autoencoder.

On a GPU some calls are recorded as a graph and replayed, so that kernels are timed and not Python; rounds take turns.
Weights and inputs are random. Every result is compared with one in fp32 of the same numbers: where ours is farther
from it than 1.5 times the first way, the exit code is 1. ``--shrink`` divides the sides, for trying out the script.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import said
from rows import Rows
from sdxl_kernels import cuda_norm
from sdxl_kernels.attention import cuda_backends
from sdxl_kernels.convolution import upsample_conv_subpixel
from sdxl_kernels.graphs import CudaRecorder
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_cli.bench.machine import machine
from sdxl_cli.bench.timing import Spread, ratio, spread, timed
from sdxl_cli.generation.device import DTYPES, compute_as_told
from sdxl_cli.model.attention import Attention

LAST = torch.channels_last
FARTHER = 1.5
"""How many times as far from fp32 as the first way another may be."""
AS_NOTHING = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""A difference that is rounding in this precision, by whichever algorithm."""
A_GRAPH = 5e-3
"""Seconds that the calls in a graph take together, about."""
MOST_CALLS = 200

Result = Tensor | list[Tensor]
Way = Callable[[], Result]


@dataclass(frozen=True, slots=True)
class Case:
    """A piece of work, done in several ways; the first is what the others replace."""

    piece: str
    name: str
    ways: dict[str, Way]
    exact: Tensor


class Maker:
    """Makes the cases."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.dtype, self.shrink = torch.device(args.device), DTYPES[args.dtype], args.shrink

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=self.device)).to(self.dtype)

    def side(self, pixels: int) -> int:
        return max(2, pixels // self.shrink)

    def norm(self) -> Iterator[Case]:
        unet = [(2, 320, 128), (2, 960, 128), (2, 640, 64), (2, 1920, 64), (2, 1280, 32), (2, 2560, 32)]
        vae = [(1, 512, 128), (1, 512, 256), (1, 512, 512), (1, 256, 512), (1, 256, 1024), (1, 128, 1024)]
        for batch, channels, pixels in unet + vae:
            side = self.side(pixels)
            x = self.random(batch, channels, side, side) + 1
            last = x.contiguous(memory_format=LAST)
            weight, bias = self.random(channels), self.random(channels)
            ways: dict[str, Way] = {
                "torch, and back to last": partial(_normalised_to_last, last, weight, bias),
                "torch, channels first": partial(_normalised, x, weight, bias),
            }
            fused = cuda_norm.ready(self.device, self.dtype)
            if not isinstance(fused, str):
                kinds: dict[str, Any] = {"width": fused.width(last, 32, weight, bias), "silu": True}
                ways["fused"] = partial(fused, last, 32, weight, bias, 1e-5, **kinds)
            exact = _normalised(x.float(), weight.float(), bias.float())
            yield Case("norm", f"{channels} at {side}², batch {batch}", ways, exact)

    def attention(self) -> Iterator[Case]:
        for heads, pixels, keys in ((10, 64, 0), (20, 32, 0), (10, 64, 77), (20, 32, 77)):
            queries = self.side(pixels) ** 2
            # as they come from a projection: a token's heads beside each other
            q, k, v = (
                self.random(2, tokens, heads, 64).transpose(1, 2)
                for tokens in (queries, keys or queries, keys or queries)
            )
            exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
            name = f"{heads} heads, {queries} tokens on {keys or 'themselves'}"
            offered = self._offered(q, k)
            able = [kernel for kernel in offered if _takes(kernel, q, k, v)]
            if gone := [kernel.name for kernel in offered if kernel not in able]:
                print(f"left out: attention, {name}: {', '.join(gone)} cannot do it here", flush=True)
            ways: dict[str, Way] = {
                kernel.name.lower() + (", the rule" if kernel is able[0] else ""): partial(
                    _attended, kernel, q, k, v
                )
                for kernel in sorted(able, key=lambda kernel: kernel is not SDPBackend.FLASH_ATTENTION)
            }
            yield Case("attention", name, ways, exact)

    def _offered(self, q: Tensor, k: Tensor) -> list[SDPBackend]:
        if self.device.type != "cuda":
            return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        offered = cuda_backends(q, k, torch.cuda.get_device_capability(self.device))
        return [kernel for kernel in offered if kernel != SDPBackend.MATH]

    def upsample(self) -> Iterator[Case]:
        for batch, channels, pixels in (
            (2, 1280, 32),
            (2, 640, 64),
            (1, 512, 128),
            (1, 512, 256),
            (1, 256, 512),
        ):
            side = self.side(pixels)
            x = self.random(batch, channels, side, side).contiguous(memory_format=LAST)
            weight, bias = self.kernel(channels).contiguous(memory_format=LAST), self.random(channels)
            ways: dict[str, Way] = {
                "doubled, 3x3": partial(_doubled, x, weight, bias),
                "four of 2x2": partial(upsample_conv_subpixel, x, weight, bias),
            }
            exact = _doubled(x.float(), weight.float(), bias.float())
            yield Case("upsample", f"{channels} at {side}², batch {batch}", ways, exact)

    def kernel(self, channels: int) -> Tensor:
        return self.random(channels, channels, 3, 3, scale=1 / (3 * channels**0.5))

    def qkv(self) -> Iterator[Case]:
        for width, pixels in ((640, 64), (1280, 32)):
            layer = Attention(width, width, 64).to(self.device, self.dtype).requires_grad_(False)
            layer.join()
            assert layer.joined is not None
            joined, linears = layer.joined, (layer.to_q, layer.to_k, layer.to_v)
            tokens = self.side(pixels) ** 2
            x = self.random(2, tokens, width)
            ways: dict[str, Way] = {
                "three products": partial(_each, linears, x),
                "one": partial(F.linear, x, joined),
            }
            exact = F.linear(x.float(), joined.float())
            yield Case("qkv", f"{tokens} tokens of {width}, batch 2", ways, exact)

    def conv(self) -> Iterator[Case]:
        sizes = (
            (2, 320, 128),
            (2, 640, 64),
            (2, 1280, 32),
            (1, 512, 128),
            (1, 512, 256),
            (1, 256, 512),
            (1, 128, 1024),
        )
        for batch, channels, pixels in sizes:
            side = self.side(pixels)
            x, weight, bias = (
                self.random(batch, channels, side, side),
                self.kernel(channels),
                self.random(channels),
            )
            ways: dict[str, Way] = {
                "channels first": partial(F.conv2d, x, weight, bias, padding=1),
                "channels last": partial(
                    F.conv2d,
                    x.contiguous(memory_format=LAST),
                    weight.contiguous(memory_format=LAST),
                    bias,
                    padding=1,
                ),
            }
            exact = F.conv2d(x.float(), weight.float(), bias.float(), padding=1)
            yield Case("conv", f"3x3, {channels} at {side}², batch {batch}", ways, exact)


def _normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-5), inplace=True)


def _normalised_to_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _normalised(x, weight, bias).contiguous(memory_format=LAST)


def _takes(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> bool:
    try:
        _attended(kernel, q, k, v)
    except RuntimeError:
        return False
    return True


def _attended(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([kernel]):
        return F.scaled_dot_product_attention(q, k, v)


def _doubled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def _each(linears: tuple[torch.nn.Linear, ...], x: Tensor) -> list[Tensor]:
    return [linear(x) for linear in linears]


def difference(found: Result, exact: Tensor) -> float:
    """Relative, in the norm over all numbers."""
    whole = torch.cat(found, dim=-1) if isinstance(found, list) else found
    return float((whole.float() - exact).norm() / exact.norm())


class Bench:
    """Times cases, and notes which results are wrong."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rounds: int, rows: Rows) -> None:
        self.device, self.dtype, self.rounds, self.rows = device, dtype, rounds, rows
        self.far: list[str] = []

    def run(self, case: Case) -> None:
        """All ways of a case in turns, and a row for each."""
        found = {way: difference(work(), case.exact) for way, work in case.ways.items()}
        self._judge(case, found)
        started = {way: self._repeated(work) for way, work in case.ways.items()}
        seconds: dict[str, list[float]] = {way: [] for way in case.ways}
        for turn in range(self.rounds):
            for way in list(started)[:: -1 if turn % 2 else 1]:
                again, calls = started[way]
                seconds[way].append(timed(again, self.device).seconds / calls)
        first = next(iter(case.ways))
        for way, took in seconds.items():
            row: dict[str, Any] = {
                "piece": case.piece, "case": case.name, "way": way, "calls": started[way][1],
                "ms": 1e3 * spread(took).median, "low_ms": 1e3 * min(took), "high_ms": 1e3 * max(took),
                "difference": found[way],
            }  # fmt: skip
            if way != first:
                row["faster_by"] = asdict(ratio(took, seconds[first]))
            text = f"{case.piece}, {case.name}: {way} {row['ms']:.4g} ms, apart {found[way]:.0e}"
            self.rows.add(row, text)

    def _judge(self, case: Case, found: dict[str, float]) -> None:
        bound = max(FARTHER * next(iter(found.values())), AS_NOTHING[self.dtype])
        for way, apart in found.items():
            if not apart <= bound:
                self.far.append(
                    f"{case.piece}, {case.name}, {way}: {apart:.1e}, at most {bound:.1e} was expected"
                )

    def _repeated(self, work: Way) -> tuple[Callable[[], object], int]:
        """What does it some times: on a GPU recorded, so that starting it takes no time."""
        once = timed(work, self.device).seconds
        if self.device.type != "cuda":
            return work, 1
        calls = min(MOST_CALLS, max(1, math.ceil(A_GRAPH / once)))

        def several() -> Tensor:
            for _ in range(calls):
                made = work()
            return made[0] if isinstance(made, list) else made

        replay, _ = CudaRecorder(self.device)(several)
        return replay, calls


COLUMNS = ("case", "way", "ms", "from … to", "faster than the first by", "difference")


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a table for each piece."""
    lines: list[str] = []
    for piece in dict.fromkeys(row["piece"] for row in rows):
        lines += ["", f"**{piece}**", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        for row in (row for row in rows if row["piece"] == piece):
            faster = said(Spread(**row["faster_by"])) if "faster_by" in row else ""
            span = f"{row['low_ms']:.4g} … {row['high_ms']:.4g}"
            cells = (row["case"], row["way"], f"{row['ms']:.4g}", span, faster, f"{row['difference']:.1e}")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


PIECES = ("norm", "attention", "upsample", "qkv", "conv")


def main() -> None:
    args = arguments()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if device.type == "cuda" and device.index is None:
        args.device = f"cuda:{torch.cuda.current_device()}"
        device = torch.device(args.device)
    about = {
        "command": ["benchmarks/gpu_kernels.py", *sys.argv[1:]],
        "machine": machine(device),
        "dtype": args.dtype,
    }
    rows = Rows(args.minutes, args.json, about)
    fused = cuda_norm.ready(device, dtype)
    if isinstance(fused, str) and "norm" in args.pieces:
        rows.leave_out("norm, fused", fused)
    torch.manual_seed(0)
    compute_as_told(torch.float32)  # what is exact is
    bench, maker = Bench(device, dtype, args.rounds, rows), Maker(args)
    with torch.inference_mode():
        for piece in args.pieces:
            for case in getattr(maker, piece)():
                if rows.allows(f"{piece}, {case.name}", piece):
                    bench.run(case)
    print("\n".join([*(f"{key} {value}" for key, value in about["machine"].items()), *tables(rows.rows)]))
    if bench.far:
        sys.exit(f"farther from fp32 than expected: {'; '.join(bench.far)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"of {', '.join(PIECES)}; all by default")
    parser.add_argument("--json", type=Path, help="written anew after every row")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="rows for which there is no time are left out"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divides the sides, for trying out the script")
    args = parser.parse_args()
    args.pieces = args.pieces or list(PIECES)
    if wrong := [piece for piece in args.pieces if piece not in PIECES]:
        parser.error(f"no piece {wrong[0]!r}; there are {', '.join(PIECES)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(
            "torch sees no CUDA device here; give --device cpu --dtype fp32 --shrink 16 for a trial of the script"
        )
    return args


if __name__ == "__main__":
    main()
