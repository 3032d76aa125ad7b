"""Layers with a small trained change beside their frozen weights: LoRA (arXiv 2106.09685) and DoRA (2402.09353).

The change is computed beside the layer and never added to its weight, so that the gradient of a weight is never needed:
that is what makes LoRA cheap. Parameters keep their names, so that a model with adapters still has all tensors of its
file, and ``….adapter.down``, ``….adapter.up`` besides. PEFT wraps layers from outside; it would not see those whose
weights go into fused operations, nor the three in one of OpenCLIP's attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdxl_cli.model.unet import GEGLU, Downsample, Upsample
from sdxl_cli.training.meta_autocast import without_autocast

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input, weight, bias) -> output: the frozen layer with any weight."""


class Adapter(nn.Module):
    """alpha/rank · up · down, for one weight; with magnitudes it is DoRA's."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, *, dropout: float, dora: bool) -> None:
        """Args:
        weight: of the frozen layer [O, I, ...]; the change begins as zero.
        rank: of the change.
        alpha: the change counts alpha / rank.
        dropout: chance of every input of the change to be left out of a step.
        dora: train a magnitude for each output besides, from the frozen weight's own on.
        """
        super().__init__()
        self.alpha, self.rank, self.chance = alpha, rank, dropout
        self.down = nn.Parameter(torch.empty((rank, *weight.shape[1:]), device=weight.device))
        # as torch's own layers begin, and the adapters of kohya's scripts and of PEFT
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros((weight.shape[0], rank), device=weight.device))
        norm = torch.linalg.vector_norm(weight.detach().float().flatten(1), dim=1)
        self.magnitude = nn.Parameter(norm) if dora else None

    @property
    def scale(self) -> float:
        """What the change counts."""
        return self.alpha / self.rank

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, operation: Operation) -> Tensor:
        """The layer with its change.

        Args:
            x: [..., I] of a linear layer, [B, I, H, W] of a convolution.
            weight: frozen [O, I, ...].
            bias: frozen [O], or none.
            operation: the frozen layer.
        """
        if self.magnitude is None:
            return operation(x, weight, bias) + self._change(x, operation)
        out = operation(x, weight, None) + self._change(x, operation)
        out = out * _along(self.magnitude / self._norm(weight), out, weight.ndim).to(out.dtype)
        return out if bias is None else out + _along(bias, out, weight.ndim).to(out.dtype)

    def _change(self, x: Tensor, operation: Operation) -> Tensor:
        hidden = operation(F.dropout(x, self.chance, self.training), self.down, None) * self.scale
        if self.down.ndim == 2:
            return F.linear(hidden, self.up)
        return F.conv2d(hidden, self.up[:, :, None, None])

    @torch.no_grad()
    def _norm(self, weight: Tensor) -> Tensor:
        """Of each output's changed weight [O]; a constant of the step (arXiv 2402.09353, section 4.3)."""
        with without_autocast(weight.device):
            changed = weight.float().flatten(1) + self.up @ self.down.flatten(1) * self.scale
            return torch.linalg.vector_norm(changed, dim=1)


def _along(values: Tensor, out: Tensor, weight_dims: int) -> Tensor:
    """A number for every output, where the outputs are: last, or before height and width."""
    return values if weight_dims == 2 else values[:, None, None]


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter; it shares the parameters of the one it stands for."""

    def __init__(self, plain: nn.Linear, adapter: Adapter) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = plain.weight
        self.register_parameter("bias", plain.bias)
        self.adapter = adapter

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self.adapter(input, self.weight, self.bias, F.linear)


class AdaptedConv(nn.Conv2d):
    """A convolution with an adapter; it shares the parameters of the one it stands for."""

    def __init__(self, plain: nn.Conv2d, adapter: Adapter) -> None:
        super().__init__(
            plain.in_channels,
            plain.out_channels,
            plain.kernel_size,  # type: ignore[arg-type]
            plain.stride,  # type: ignore[arg-type]
            plain.padding,  # type: ignore[arg-type]
            bias=plain.bias is not None,
            device="meta",
        )
        self.weight = plain.weight
        self.bias = plain.bias
        self.adapter = adapter

    def forward(self, input: Tensor) -> Tensor:
        """[B, I, H, W] -> [B, O, ...]."""
        return self.adapter(input, self.weight, self.bias, self._convolved)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class CalledGEGLU(GEGLU):
    """GEGLU that asks its projection, where the plain one takes the weight out of it."""

    def __init__(self, plain: GEGLU) -> None:
        nn.Module.__init__(self)
        self.proj = plain.proj

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, inner]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class CalledDownsample(Downsample):
    """Halves height and width by asking its convolution."""

    def __init__(self, plain: Downsample) -> None:
        nn.Module.__init__(self)
        self.op = plain.op

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2], rounded up."""
        return self.op(x)


class CalledUpsample(Upsample):
    """Doubles height and width by asking its convolution."""

    def __init__(self, plain: Upsample) -> None:
        nn.Module.__init__(self)
        self.conv = plain.conv

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, C, H, W] -> [B, C, *size]."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class CalledAttention(nn.Module):
    """OpenCLIP's self-attention with adapters for queries, keys and values, whose weights are one there."""

    def __init__(self, plain: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = plain.num_heads
        self.in_proj_weight, self.in_proj_bias = plain.in_proj_weight, plain.in_proj_bias
        self.out_proj: nn.Module = plain.out_proj
        self.adapters = nn.ModuleDict()
        """By ``q``, ``k`` and ``v``."""

    def third(self, part: str) -> Tensor:
        """The rows of the weight that are of ``q``, ``k`` or ``v`` [C, C]."""
        return self.in_proj_weight.chunk(3)["qkv".index(part)]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool, attn_mask: Tensor | None
    ) -> tuple[Tensor, None]:
        """[B, L, C], the same three times, and a mask that is added [L, L] -> [B, L, C]."""
        inputs = {"q": query, "k": key, "v": value}
        q, k, v = (
            rearrange(self._projected(part, x), "b l (h d) -> b h l d", h=self.heads)
            for part, x in inputs.items()
        )
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if attn_mask is None else attn_mask.to(q)
        )
        return self.out_proj(rearrange(out, "b h l d -> b l (h d)")), None

    def _projected(self, part: str, x: Tensor) -> Tensor:
        weight, bias = self.third(part), self.in_proj_bias.chunk(3)["qkv".index(part)]
        if part in self.adapters:
            return self.adapters[part](x, weight, bias, F.linear)
        return F.linear(x, weight, bias)
