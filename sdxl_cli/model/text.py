"""The two text encoders, in the parameter names of the released single file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from sdxl_cli.model.clip import ClipTextTransformer
from sdxl_cli.model.config import TextTowerConfig
from sdxl_cli.model.library import module_alone

PENULTIMATE = 2
"""The layer SDXL reads, counted from the end: 1 is the last (paper section 2.1)."""


@dataclass(frozen=True, slots=True)
class Insert:
    """A learned vector in the place of a token's own embedding (textual inversion, arXiv 2208.01618)."""

    row: int
    position: int
    vector: Tensor
    """[width]."""


@cache
def open_clip_towers() -> ModuleType:
    """open_clip's text towers, without its vision towers, loaders and losses, and what these import."""
    return module_alone("open_clip.transformer", ("torchvision", "torchvision.ops", "open_clip"))


class ClipLEmbedder(nn.Module):
    """CLIP ViT-L's text tower (sgm FrozenCLIPEmbedder, layer "hidden", index 11)."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.Module()
        self.transformer.text_model = ClipTextTransformer(config)

    def forward(self, ids: Tensor, layer: int = PENULTIMATE, inserts: Sequence[Insert] = ()) -> Tensor:
        """Encode token ids.

        Args:
            ids: [B, 77].
            layer: whose output is wanted, counted from the end, 1 … number of layers.
            inserts: learned vectors in the place of tokens.

        Returns:
            The layer's output, without the final norm [B, 77, width].
        """
        tower = self.transformer.get_submodule("text_model")
        with _inserted(tower.get_submodule("embeddings.token_embedding"), inserts):
            features: Tensor = tower(ids, layer)
        return features


class OpenClipEmbedder(nn.Module):
    """OpenCLIP ViT-bigG's text tower, without its vision tower (sgm FrozenOpenCLIPEmbedder2)."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        towers = open_clip_towers()
        activations = {"gelu": nn.GELU, "quick_gelu": towers.QuickGELU}
        self.model = towers.TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=config.embed_dim,
            act_layer=activations[config.activation],
        )
        # in the released files, not used by SDXL
        self.model.logit_scale = nn.Parameter(torch.zeros(()))
        causal = torch.full((config.context_length,) * 2, float("-inf"), device="cpu").triu_(1)
        self.model.register_buffer("attn_mask", causal, persistent=False)

    def forward(
        self, ids: Tensor, layer: int = PENULTIMATE, inserts: Sequence[Insert] = ()
    ) -> tuple[Tensor, Tensor]:
        """Encode token ids.

        Args:
            ids: [B, 77].
            layer: whose output is wanted, counted from the end, 1 … number of layers.
            inserts: learned vectors in the place of tokens.

        Returns:
            The layer's output, without the final norm [B, 77, width]; and, whatever the layer, the projected final
            feature of the end-of-text token, which has the highest id [B, embed_dim].
        """
        model = self.model
        with _inserted(model.token_embedding, inserts):
            x = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
        mask = model.attn_mask[: ids.shape[1], : ids.shape[1]].to(x.dtype)
        blocks = list(model.transformer.resblocks)
        features = x
        for left, block in zip(range(len(blocks), 0, -1), blocks, strict=True):
            x = block(x, attn_mask=mask)
            if left == layer:
                features = x
        end = ids.argmax(dim=-1)
        pooled = model.ln_final(x)[torch.arange(len(ids), device=ids.device), end] @ model.text_projection
        return features, pooled


@contextmanager
def _inserted(table: nn.Module, inserts: Sequence[Insert]) -> Iterator[None]:
    """Let a token table give learned vectors at some places, for as long as this lasts."""

    def replace(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        output = output.clone()
        for insert in inserts:
            output[insert.row, insert.position] = insert.vector.to(output)
        return output

    if not inserts:
        yield
        return
    hook = table.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


TOKEN_STD, POSITION_STD = 0.5, 0.1


@torch.no_grad()
def initialize(embedder: nn.Module) -> None:
    """Starting values of a text encoder for training along with a U-Net.

    The U-Net reads the penultimate layer without a norm. CLIP's own starting values, 0.02, would make its
    cross-attention begin with almost nothing to tell prompts apart by.
    """
    for name, parameter in embedder.named_parameters():
        if name.endswith("token_embedding.weight"):
            nn.init.normal_(parameter, std=TOKEN_STD)
        elif name.endswith(("position_embedding.weight", "positional_embedding")):
            nn.init.normal_(parameter, std=POSITION_STD)
