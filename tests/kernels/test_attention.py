"""Attention against its formula, and which CUDA kernels are offered for which problem."""

from __future__ import annotations

import math

import pytest
import torch
from sdxl_kernels import attention as module
from sdxl_kernels.attention import MATH_LIMIT, attention, attention_in_products, cuda_backends
from torch import Tensor
from torch.nn.attention import SDPBackend

from sdxl_cli.model.live_bytes import LiveBytes

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
AMPERE, ADA, HOPPER, BLACKWELL, DESKTOP = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhld,bhsd->bhls", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhls,bhsd->bhld", weights / weights.sum(-1, keepdim=True), v)


SHAPES = {
    "tokens on themselves": (2, 3, 35, 35, 16),
    "on a text": (1, 5, 24, 77, 64),
    "one head as wide as the VAE's": (2, 1, 30, 30, 512),
    "one key": (2, 2, 5, 1, 8),
    "one query": (1, 2, 1, 9, 8),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_it_is_the_softmax_of_scaled_scores(name: str, dtype: torch.dtype, bound: float) -> None:
    batch, heads, queries, keys, width = SHAPES[name]
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, width, dtype=dtype)
    k, v = (torch.randn(batch, heads, keys, width, dtype=dtype) for _ in range(2))
    assert (attention(q, k, v) - formula(q, k, v)).abs().max() < bound


def test_tokens_first_in_memory() -> None:
    """As they come out of a projection: [B, L, H·D], seen as [B, H, L, D]."""
    q, k, v = (torch.randn(2, 13, 4, 8, dtype=torch.float64).transpose(1, 2) for _ in range(3))
    assert not q.is_contiguous()
    assert torch.allclose(attention(q, k, v), formula(q, k, v))


def test_large_scores_do_not_overflow() -> None:
    q, v = 200 * torch.randn(1, 1, 7, 8), torch.randn(1, 1, 7, 8)
    out = attention(q, q, v)
    assert torch.isfinite(out).all()
    assert torch.allclose(out, formula(q, q, v), atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("few", [0, 256])
def test_in_products_it_is_the_same(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES", 8)
    monkeypatch.setattr(module, "FEW_TOKENS", few)
    batch, heads, queries, keys, width = SHAPES[name]
    q = torch.randn(batch, heads, queries, width, dtype=torch.float64)
    k, v = (torch.randn(batch, heads, keys, width, dtype=torch.float64) for _ in range(2))
    assert (attention_in_products(q, k, v) - formula(q, k, v)).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("dtype", "native", "products"),
    [(torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float32, True, False)],
)
def test_products_where_the_processor_has_them(
    dtype: torch.dtype, native: bool, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 torch's fused kernel is slower there; while training it keeps less."""
    asked: list[int] = []
    monkeypatch.setattr(module, "cpu_multiplies_bf16", lambda: native)
    monkeypatch.setattr(module, "attention_in_products", lambda q, k, v: asked.append(1) or q)
    q = torch.randn(1, 1, 4, 8).to(dtype)
    attention(q, q, q)
    assert not asked
    with torch.no_grad():
        attention(q, q, q)
    assert bool(asked) is products


def test_on_the_meta_device_no_scores_are_held() -> None:
    """So that memory is estimated as it is: 16384² scores of the VAE would be 1 GiB."""
    q = torch.empty(1, 1, 4096, 64, device="meta")
    with LiveBytes() as seen, torch.no_grad():
        attention(q, q, q)
    assert seen.peak < 4 * q.nbytes


def test_gradients() -> None:
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    assert torch.autograd.gradcheck(attention, (q, k, v))


def problem(dtype: torch.dtype, width: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """Nothing is computed: expanding costs no memory."""
    one = torch.zeros((), dtype=dtype)
    return one.expand(2, 10, queries, width), one.expand(2, 10, keys, width)


@pytest.mark.parametrize(
    ("dtype", "width", "queries", "keys", "expected"),
    [
        (torch.bfloat16, 64, 4096, 4096, [FLASH, CUDNN, EFFICIENT]),
        (torch.float16, 64, 4096, 77, [FLASH, CUDNN, EFFICIENT, MATH]),
        (torch.bfloat16, 64, 1024, 1024, [FLASH, CUDNN, EFFICIENT, MATH]),
        (torch.bfloat16, 64, 1025, 1024, [FLASH, CUDNN, EFFICIENT]),
        (torch.bfloat16, 256, 4096, 4096, [FLASH, CUDNN, EFFICIENT]),
        (torch.bfloat16, 512, 16384, 16384, [EFFICIENT]),
        (torch.bfloat16, 512, 64, 64, [EFFICIENT, MATH]),
        (torch.bfloat16, 20, 4096, 4096, [EFFICIENT]),
        (torch.float32, 64, 4096, 4096, [EFFICIENT]),
        (torch.float32, 64, 4096, 77, [EFFICIENT, MATH]),
        (torch.float64, 64, 32, 32, [EFFICIENT, MATH]),
    ],
)
def test_which_kernels_are_offered(
    dtype: torch.dtype, width: int, queries: int, keys: int, expected: list[SDPBackend]
) -> None:
    """Fused ones for what they take, best first; the one that holds all scores for small problems only."""
    assert cuda_backends(*problem(dtype, width, queries, keys), AMPERE) == expected


def test_the_limit_of_the_unfused_kernel_is_in_scores_a_head() -> None:
    """At 1024² self-attention has 4096² or 1024² of them, the VAE 16384²; a text adds 77 a query."""
    assert MATH_LIMIT == 1024**2
    assert MATH not in cuda_backends(*problem(torch.float32, 512, 16384, 16384), AMPERE)
    assert MATH in cuda_backends(*problem(torch.float32, 64, 4096, 154), AMPERE)


@pytest.mark.parametrize(
    ("width", "queries", "keys", "cudnn"),
    [
        (64, 4096, 4096, True),
        (64, 1024, 1024, True),
        (64, 1023, 1023, False),
        (64, 4096, 77, False),
        (64, 4096, 154, False),
        (128, 4096, 4096, True),
        (256, 4096, 4096, False),
    ],
)
@pytest.mark.parametrize("capability", [AMPERE, ADA, HOPPER, BLACKWELL, DESKTOP])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_which_kernel_comes_first(
    dtype: torch.dtype, width: int, queries: int, keys: int, cudnn: bool, capability: tuple[int, int]
) -> None:
    """cuDNN's for images on themselves, on the generations that it has kernels of their own for."""
    first, second = cuda_backends(*problem(dtype, width, queries, keys), capability)[:2]
    hopper = capability in (HOPPER, BLACKWELL)
    assert (first, second) == ((CUDNN, FLASH) if cudnn and hopper else (FLASH, CUDNN))


def test_training_takes_the_same_kernel_everywhere() -> None:
    q, k = problem(torch.bfloat16, 64, 4096, 4096)
    learned = q.clone().requires_grad_()
    assert cuda_backends(learned, k, HOPPER) == cuda_backends(learned, k, AMPERE)
    assert cuda_backends(q, k, HOPPER) != cuda_backends(q, k, AMPERE)


def test_single_precision_is_none_of_cudnns_business() -> None:
    assert CUDNN not in cuda_backends(*problem(torch.float32, 64, 4096, 4096), HOPPER)
