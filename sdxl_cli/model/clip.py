"""CLIP's text transformer (arXiv 2103.00020, section 2.4), in the parameter names of the released single file.

transformers has it too, and is what this one is compared with; but importing that takes seconds, which every picture
would begin with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdxl_cli.model.config import TextTowerConfig

STD = 0.02
"""Of the embeddings' starting values (CLIP's model.py, initialize_parameters)."""


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


class _Attention(nn.Module):
    """Each token reads itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # in the order of transformers', which optimizers and checksums go by
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b h l d", h=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(read, "b h l d -> b l (h d)"))


class _FeedForward(nn.Module):
    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.activation_fn = {"gelu": nn.GELU, "quick_gelu": QuickGELU}[activation]()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        return self.fc2(self.activation_fn(self.fc1(x)))


class _Layer(nn.Module):
    """Attention and feed-forward; each pre-normed and residual."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = _FeedForward(config.width, config.activation)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipTextTransformer(nn.Module):
    """Token ids to the features of any layer."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.embeddings.position_embedding = nn.Embedding(config.context_length, config.width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.final_layer_norm = nn.LayerNorm(config.width)
        _initialize(self, config)

    def forward(self, ids: Tensor, layer: int) -> Tensor:
        """Encode token ids.

        Args:
            ids: [B, L], L at most the context's length.
            layer: whose output is wanted, counted from the end, 1 … number of layers.

        Returns:
            The layer's output, without the final norm [B, L, width].
        """
        positions = self.embeddings.get_parameter("position_embedding.weight")[: ids.shape[1]]
        x = self.embeddings.get_submodule("token_embedding")(ids) + positions
        layers = list(self.encoder.get_submodule("layers").children())
        for block in layers[: len(layers) + 1 - layer]:
            x = block(x)
        return x


@torch.no_grad()
def _initialize(tower: ClipTextTransformer, config: TextTowerConfig) -> None:
    """CLIP's starting values: what is added to the residual stream shrinks with the number of layers."""
    width = config.width**-0.5
    residual = width * (2 * config.layers) ** -0.5
    stds = {"fc1": (2 * config.width) ** -0.5, "fc2": residual, "out_proj": width}
    for name, module in tower.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=STD)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=stds.get(name.rsplit(".", 1)[-1], residual))
            nn.init.zeros_(module.bias)
