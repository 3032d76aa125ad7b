"""The attention of the U-Net's transformers: of tokens on a text, or on themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from sdxl_kernels.attention import attention
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class KeysValues:
    """What an attention layer reads of its context."""

    keys: Tensor
    """[B, H, S, d]."""
    values: Tensor
    """[B, H, S, d]."""


class Attention(nn.Module):
    """Multi-head attention of tokens on a context; on themselves when there is none."""

    def __init__(self, width: int, context_width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))
        self.joined: Tensor | None = None
        """The weights of queries, keys and values below each other [3·C, C]; see :meth:`join`."""

    def join(self) -> None:
        """Let tokens that attend to themselves be projected by one product; for inference on a GPU.

        The three weights move into one storage, one below the other. They stay parameters with their names, and
        whoever changes them in place changes the product.
        """
        linears = (self.to_q, self.to_k, self.to_v)
        joined = torch.cat([linear.weight.detach() for linear in linears])
        for linear, rows in zip(linears, joined.chunk(3), strict=True):
            linear.weight.data = rows
        self.joined = joined

    def of_itself(self, x: Tensor) -> Tensor:
        """Attention of tokens on themselves: [B, L, C] -> [B, L, C]."""
        if not self._is_joined():
            return self(x, self.read(x))
        assert self.joined is not None
        q, k, v = (self._split(part) for part in F.linear(x, self.joined).chunk(3, dim=-1))
        return self.to_out(rearrange(attention(q, k, v), "b h l d -> b l (h d)"))

    def _is_joined(self) -> bool:
        """Whether there is one weight, and the three parameters are still parts of it: they may have been replaced."""
        if self.joined is None or torch.is_grad_enabled():
            return False
        starts = [part.data_ptr() for part in self.joined.chunk(3)]
        if starts != [linear.weight.data_ptr() for linear in (self.to_q, self.to_k, self.to_v)]:
            self.joined = None
        return self.joined is not None

    def read(self, source: Tensor) -> KeysValues:
        """[B, S, ctx] -> keys and values."""
        return KeysValues(self._split(self.to_k(source)), self._split(self.to_v(source)))

    def forward(self, x: Tensor, source: KeysValues) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        out = attention(self._split(self.to_q(x)), source.keys, source.values)
        return self.to_out(rearrange(out, "b h l d -> b l (h d)"))

    def _split(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b l (h d) -> b h l d", h=self.heads)
