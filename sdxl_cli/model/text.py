"""The two text encoders, in the parameter names of the released single file."""

from __future__ import annotations

import torch
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdxl_cli.model.config import TextTowerConfig

_ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class ClipLEmbedder(nn.Module):
    """CLIP ViT-L's text tower, through transformers (sgm FrozenCLIPEmbedder, layer "hidden", index 11)."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                projection_dim=config.embed_dim,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.context_length,
                hidden_act=config.activation,
                bos_token_id=config.vocab_size - 2,
                eos_token_id=config.vocab_size - 1,
            )
        )
        self.transformer = nn.Module()
        # transformers 5 dropped the text_model level; the released files have it
        tower: nn.Module = getattr(model, "text_model", model)
        self.transformer.text_model = tower
        positions = torch.arange(config.context_length, device="cpu")[None]
        tower.get_submodule("embeddings").register_buffer("position_ids", positions, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> the penultimate layer's output, without the final norm [B, 77, width]."""
        tower = self.transformer.get_submodule("text_model")
        states: tuple[Tensor, ...] = tower(input_ids=ids, output_hidden_states=True).hidden_states
        return states[-2]


class OpenClipEmbedder(nn.Module):
    """OpenCLIP ViT-bigG's text tower, without its vision tower (sgm FrozenOpenCLIPEmbedder2)."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=config.embed_dim,
            act_layer=_ACTIVATIONS[config.activation],
        )
        # in the released files, not used by SDXL
        self.model.logit_scale = nn.Parameter(torch.zeros(()))
        causal = torch.full((config.context_length,) * 2, float("-inf"), device="cpu").triu_(1)
        self.model.register_buffer("attn_mask", causal, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids.

        Args:
            ids: [B, 77].

        Returns:
            The input of the last block, without the final norm [B, 77, width]; and the projected final
            feature of the end-of-text token, which has the highest id [B, embed_dim].
        """
        model = self.model
        x = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
        mask = model.attn_mask[: ids.shape[1], : ids.shape[1]].to(x.dtype)
        *blocks, last = model.transformer.resblocks
        for block in blocks:
            x = block(x, attn_mask=mask)
        final = model.ln_final(last(x, attn_mask=mask))
        end = ids.argmax(dim=-1)
        pooled = final[torch.arange(len(ids), device=ids.device), end] @ model.text_projection
        return x, pooled


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
