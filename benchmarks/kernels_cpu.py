"""The exact rewrites of convolutions, attention and the autoencoder on one CPU core, each against what it replaces.

python benchmarks/kernels_cpu.py [conv block attention linear vae] [--side PIXELS] [--rounds N]

Rounds are interleaved and timed as CPU time of this process; printed is the best of each, its ratio to the first, and
how far the results are apart. Weights and inputs are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sdxl_kernels import strips
from sdxl_kernels.attention import attention_in_products
from torch import Tensor

from sdxl_cli.generation.allocator import reuse_large_blocks
from sdxl_cli.model import vae_strips
from sdxl_cli.model.config import BASE
from sdxl_cli.model.unet import ResBlock
from sdxl_cli.model.vae import Autoencoder

Ways = dict[str, Callable[[], Tensor]]


def compare(name: str, ways: Ways, rounds: int) -> None:
    best = dict.fromkeys(ways, float("inf"))
    results = {way: work() for way, work in ways.items()}
    for _ in range(rounds):
        for way, work in ways.items():
            start = time.process_time()
            work()
            best[way] = min(best[way], time.process_time() - start)
    first = next(iter(ways))
    for way, seconds in best.items():
        apart = float((results[way] - results[first]).norm() / results[first].norm())
        ratio = best[first] / seconds
        print(f"{name:28s} {way:24s} {1e3 * seconds:9.1f} ms  {ratio:5.2f}x  apart {apart:.0e}", flush=True)


def conv(args: argparse.Namespace) -> None:
    sizes = ((320, 64, 2), (640, 32, 2), (1280, 16, 2), (512, 64, 1), (256, 128, 1), (128, 256, 1))
    for channels, side, batch in sizes:
        ways = convolutions(channels, side, batch)
        compare(f"3x3, {channels} at {side}, batch {batch}", ways, args.rounds)


def convolutions(channels: int, side: int, batch: int) -> Ways:
    x, bias = torch.randn(batch, side, side, channels), torch.randn(channels)
    weight = torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)
    nchw = x.permute(0, 3, 1, 2).contiguous()
    return {
        "torch": lambda: F.conv2d(nchw, weight, bias, padding=1).permute(0, 2, 3, 1),
        "strips": lambda: strips.conv3x3(x, weight, bias),
        "strips, Winograd": lambda: strips.conv3x3(x, weight, bias, winograd=True),
    }


def block(args: argparse.Namespace) -> None:
    for inputs, outputs, side in ((320, 320, 64), (640, 640, 32), (1280, 640, 32), (1280, 1280, 16)):
        compare(f"block {inputs} -> {outputs} at {side}", blocks(inputs, outputs, side), args.rounds)


def blocks(inputs: int, outputs: int, side: int) -> Ways:
    plain, fast = (ResBlock(inputs, outputs, 1280, 32) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    fast.fast = True
    x, emb = torch.randn(2, inputs, side, side), torch.randn(2, 1280)
    last = x.contiguous(memory_format=torch.channels_last)
    return {"plain": lambda: plain(x, emb), "fast": lambda: fast(last, emb)}


def attention(args: argparse.Namespace) -> None:
    for heads, queries, keys in ((10, 4096, 4096), (20, 1024, 1024), (20, 1024, 77)):
        compare(f"attention {queries} on {keys}", attentions(heads, queries, keys), args.rounds)


def attentions(heads: int, queries: int, keys: int) -> Ways:
    q = torch.randn(1, queries, heads, 64).transpose(1, 2)
    k, v = (torch.randn(1, keys, heads, 64).transpose(1, 2) for _ in range(2))
    return {
        "torch, fused": lambda: F.scaled_dot_product_attention(q, k, v),
        "products": lambda: attention_in_products(q, k, v),
    }


def linear(args: argparse.Namespace) -> None:
    for tokens, inputs, outputs in ((1024, 1280, 1280), (1024, 1280, 3840), (1024, 1280, 10240)):
        compare(f"linear {tokens}x{inputs} -> {outputs}", linears(tokens, inputs, outputs), args.rounds)


def linears(tokens: int, inputs: int, outputs: int) -> Ways:
    x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs) / inputs**0.5
    packed, thirds = torch.ops.mkldnn._reorder_linear_weight(weight, tokens), weight.tensor_split(3)
    return {
        "torch": lambda: F.linear(x, weight),
        "oneDNN, prepacked": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        "in three, as q, k, v": lambda: torch.cat([F.linear(x, third) for third in thirds], dim=-1),
    }


def vae(args: argparse.Namespace) -> None:
    network = Autoencoder(BASE.vae).eval()
    z = torch.randn(1, 4, args.side // 8, args.side // 8)
    ways = {
        "whole": lambda: network.decode(z),
        "strips": lambda: vae_strips.decode(network, z),
        "strips, Winograd": lambda: vae_strips.decode(network, z, winograd=True),
    }
    compare(f"decoding {args.side}²", ways, args.rounds)


PIECES = {"conv": conv, "block": block, "attention": attention, "linear": linear, "vae": vae}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", default=list(PIECES), metavar="PIECE")
    parser.add_argument("--side", type=int, default=256, help="of the picture that vae decodes, in pixels")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kept = reuse_large_blocks()
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, large blocks reused: {kept}"
    )
    with torch.inference_mode():
        for piece in args.pieces:
            PIECES[piece](args)


if __name__ == "__main__":
    main()
