"""Scaled dot-product attention, always through torch's fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_kernels.processor import cpu_multiplies_bf16

MATH_LIMIT = 1 << 20
"""Largest number of scores per head that the unfused kernel may materialise on CUDA."""


CUDNN_FIRST = (9, 10)
"""Generations (Hopper, Blackwell) for whose matrix units cuDNN's kernels are made, and torch's flash kernel is not."""
CUDNN_TOKENS, CUDNN_WIDTH = 1024, 128
"""Fewest queries and keys, and widest head, for which cuDNN comes first there."""


def cuda_backends(q: Tensor, k: Tensor, capability: tuple[int, int]) -> list[SDPBackend]:
    """The fused CUDA kernels that can take these tensors, best first.

    Flash and cuDNN take 16-bit types with head widths up to 256 that are multiples of 8; the
    memory-efficient kernel takes every type. The math kernel holds all scores at once (16,384 tokens of
    the VAE would be 1 GiB per image), so it is offered for small problems only.

    A rule and no measurement, so that the same command takes the same kernel each time.

    Args:
        q: queries [B, H, L, D].
        k: keys [B, H, S, D].
        capability: of the device, (9, 0) and the like.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    width = q.shape[-1]
    backends = []
    if half and width % 8 == 0 and width <= 256:
        backends += [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        long = min(q.shape[-2], k.shape[-2]) >= CUDNN_TOKENS and width <= CUDNN_WIDTH
        if long and capability[0] in CUDNN_FIRST and not q.requires_grad:
            backends.reverse()
    backends.append(SDPBackend.EFFICIENT_ATTENTION)
    if q.shape[-2] * k.shape[-2] <= MATH_LIMIT:
        backends.append(SDPBackend.MATH)
    return backends


QUERIES = 512
"""How many queries' scores are held at once."""
FEW_TOKENS = 256
"""Up to this many keys or queries, all heads together are one product."""


def attention_in_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as :func:`attention`, as two matrix products around a softmax, for some queries at a time.

    Arguments and result as there. Scores are rounded to the tensors' own precision.
    """
    batch, heads, queries, width = q.shape
    keys = (k * width**-0.5).mT
    if min(queries, k.shape[-2]) <= FEW_TOKENS:
        return torch.softmax(q @ keys, dim=-1) @ v
    out = torch.empty_like(q)
    for row in range(batch):
        for head in range(heads):
            value = v[row, head].contiguous()
            for start in range(0, queries, QUERIES):
                some = slice(start, start + QUERIES)
                out[row, head, some] = torch.softmax(q[row, head, some] @ keys[row, head], dim=-1) @ value
    return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v.

    Args:
        q: queries [B, H, L, D].
        k: keys [B, H, S, D].
        v: values [B, H, S, D].

    Returns:
        [B, H, L, D].

    Raises:
        RuntimeError: on CUDA, when no fused kernel takes a problem too large for the unfused one.
    """
    if q.is_meta:  # as on a CPU; by itself torch would count the scores that no fused kernel ever holds
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    if (
        q.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and q.device.type == "cpu"
        and cpu_multiplies_bf16()
    ):
        return attention_in_products(q, k, v)
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(cuda_backends(q, k, _capability(q.device)), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def _capability(device: torch.device) -> tuple[int, int]:
    # not get_device_capability, which torch's compiler does not know to be constant
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor
