"""Group normalisation and SiLU on CUDA, of tensors whose channels are last in memory, which they stay.

torch's own copies such a tensor to channels first, and leaves it there. Two kernels (``group_norm.cu``): the moments
of parts of an image, then, from those, the result. Nothing is added up in an order that may change.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sdxl_kernels.nvrtc import CudaError, Kernels, compiled

SOURCE = Path(__file__).with_name("group_norm.cu")
KINDS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""What can be normalised, and its name in the source."""
WANTED = (torch.float16, torch.bfloat16)
"""In which channels are to stay last: tensor cores want it. In fp32 convolutions like them first."""
BYTES = 16
"""What a thread reads at once."""
AT_ONCE = 4
"""Pixels that a thread has under way."""
THREADS = 512
"""Of a block; more only where a pixel has more to read."""
MOST_THREADS, MOST_CHANNELS, MOST_GROUPS = 1024, 4096, 256
PARTS = 256
"""Blocks that count, of all images together: about two for each multiprocessor of a large device."""
BLOCKS = 1024
"""Blocks that normalise: more, as they take turns."""
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""How far a result may be from torch's in fp32, as a part of its largest number: rounding, with room."""


def options(dtype: torch.dtype) -> list[str]:
    """What the source is to be told by its compiler."""
    numbers = {"WIDE": BYTES // dtype.itemsize, "AT_ONCE": AT_ONCE, "MOST_THREADS": MOST_THREADS}
    numbers |= {"MOST_CHANNELS": MOST_CHANNELS, "MOST_GROUPS": MOST_GROUPS}
    return [f"-DKIND_{KINDS[dtype]}", *(f"-D{name}={number}" for name, number in numbers.items())]


@dataclass(frozen=True, slots=True)
class Division:
    """Who does what. It depends on shapes alone, so the same is added up in the same order everywhere."""

    width: int
    """Channels of a thread."""
    rows: int
    """Pixels of a block at a time."""
    threads: int
    part: int
    """Pixels of a block that counts."""
    parts: int
    """Such blocks of an image."""
    block: int
    """Pixels of a block that normalises."""
    blocks: int
    """Such blocks of an image."""


def divided(images: int, pixels: int, channels: int, width: int) -> Division:
    """Divide the work so that a large device is busy, and no thread has too little to do."""
    vectors = channels // width
    rows = max(1, THREADS // vectors)
    part, block = (max(rows * AT_ONCE, -(-pixels // max(1, most // images))) for most in (PARTS, BLOCKS))
    threads = -(-vectors * rows // 32) * 32
    return Division(width, rows, threads, part, -(-pixels // part), block, -(-pixels // block))


class FusedNorm:
    """The kernels for one dtype."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        self._kernels, self.dtype = kernels, dtype

    def width(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> int:
        """How many channels a thread takes; 0 for what these kernels do not take."""
        channels = x.shape[1]
        if x.numel() == 0 or channels > MOST_CHANNELS or groups > MOST_GROUPS or channels % groups:
            return 0
        alike = x.dtype == weight.dtype == bias.dtype == self.dtype
        if not alike or not weight.is_contiguous() or not bias.is_contiguous():
            return 0
        wide = BYTES // self.dtype.itemsize
        if channels % wide == 0 and x.data_ptr() % BYTES == 0:
            return wide
        return 1 if channels <= MOST_THREADS else 0

    def __call__(
        self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, width: int, silu: bool
    ) -> Tensor:
        """As :func:`sdxl_kernels.normalization.group_norm`, or followed by SiLU.

        Args:
            x: [B, C, H, W], channels last in memory.
            groups: how many.
            weight: [C].
            bias: [C].
            eps: added to the variance.
            width: from :meth:`width`.
            silu: whether SiLU follows.

        Returns:
            [B, C, H, W], channels last in memory.
        """
        images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        work, kind = divided(images, pixels, channels, width), "single" if width == 1 else "wide"
        parts = torch.empty(images, groups, work.parts, 2, dtype=torch.float32, device=x.device)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        shape = (pixels, channels, groups, work.rows, work.part)
        self._kernels.launch(f"count_{kind}", (work.parts, images), work.threads, (x, parts, *shape))
        self._kernels.launch(
            f"normalize_silu_{kind}" if silu else f"normalize_{kind}",
            (work.blocks, images),
            work.threads,
            (x, out, weight, bias, parts, *shape, work.parts, work.block, float(eps)),
        )
        return out


def fused_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor | None:
    """Normalise by these kernels; None where they are not for: then torch's own are.

    Arguments as for :func:`sdxl_kernels.normalization.group_norm`.
    """
    if x.dtype not in WANTED or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    fused = ready(x.device, x.dtype)
    if isinstance(fused, str):
        return None
    width = fused.width(x, groups, weight, bias)
    return fused(x, groups, weight, bias, eps, width=width, silu=silu) if width else None


@cache
def ready(device: torch.device, dtype: torch.dtype) -> FusedNorm | str:
    """The kernels for a device, compiled and compared with torch's; or why there are none, in a line.

    The first call for a device must not be while a graph is recorded.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device} is no NVIDIA device"
    if dtype not in KINDS:
        return f"there is none for {dtype}"
    try:
        fused = load(device, dtype)
        apart = deviation(fused, device)
    except CudaError as error:
        return str(error)
    if apart <= TOLERANCES[dtype]:
        return fused
    why = f"its results differ from torch's by {apart:.1e}"
    warnings.warn(f"the fused group norm is not used on {device} in {dtype}: {why}", stacklevel=2)
    return why


def load(device: torch.device, dtype: torch.dtype) -> FusedNorm:
    """Compile the kernels and bring them to a device.

    Raises:
        CudaError: the compiler or the driver is not there, or refuses.
    """
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # from here on there is a context, which is current
        major, minor = torch.cuda.get_device_capability(device)
        image = compiled(SOURCE.read_text("utf-8"), f"sm_{major}{minor}", options(dtype))
        return FusedNorm(Kernels(image, lambda: torch.cuda.current_stream(device).cuda_stream), dtype)


SHAPES = ((2, 320, 17, 23), (1, 640, 64, 64), (2, 1280, 9, 7), (1, 128, 96, 101))
"""What is compared: groups of 10, 20, 40 and 4 channels, several parts, and pixels left over."""


def deviation(fused: FusedNorm, device: torch.device) -> float:
    """How far results are from torch's in fp32, as a part of their largest number; on the same numbers each time."""
    random, found = torch.Generator().manual_seed(0), []
    for shape in SHAPES:
        x, weight, bias = (torch.randn(size, generator=random) for size in (shape, (shape[1],), (shape[1],)))
        x = (3 * x + 30).contiguous(memory_format=torch.channels_last)
        x, weight, bias = (value.to(device, fused.dtype) for value in (x, weight, bias))
        width = fused.width(x, 32, weight, bias)
        exact = F.group_norm(x.float(), 32, weight.float(), bias.float(), 1e-5)
        for silu in (False, True):
            expected = F.silu(exact) if silu else exact
            made = fused(x, 32, weight, bias, 1e-5, width=width, silu=silu).float()
            found.append((made - expected).abs().max() / expected.abs().max())
    return float(torch.stack(found).max())
