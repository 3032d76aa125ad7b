"""Text features and micro-conditions, put together as the U-Net reads them (paper section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdxl_cli.model.config import ModelConfig, Scalar
from sdxl_cli.model.embedding import sinusoidal
from sdxl_cli.model.text import PENULTIMATE, ClipLEmbedder, Insert, OpenClipEmbedder


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroConditioning:
    """What the model is told about a picture besides its text. Pairs are (height, width) and (top, left)."""

    original_size: tuple[int, int]
    """c_size: pixels before any resizing."""
    crop_top_left: tuple[int, int] = (0, 0)
    """c_crop: pixels of the resized picture cut off above and to the left."""
    target_size: tuple[int, int]
    """c_ar: the bucket, in pixels."""
    aesthetic_score: float = 6.0
    """Refiner only, about 1 … 10."""

    def numbers(self, scalars: Sequence[Scalar]) -> list[float]:
        """The numbers of the named conditions, in order."""
        flat: list[float] = []
        for name in scalars:
            value = getattr(self, name)
            flat += list(value) if isinstance(value, tuple) else [value]
        return flat


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """What the text encoders give."""

    crossattn: Tensor
    """[B, T, context_dim]: CLIP-L features then bigG features."""
    pooled: Tensor
    """[B, embed_dim] of bigG."""

    def zeros(self) -> TextFeatures:
        """The empty condition of the released base model: all features zero."""
        return TextFeatures(torch.zeros_like(self.crossattn), torch.zeros_like(self.pooled))


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the U-Net is conditioned on."""

    crossattn: Tensor
    """[B, T, context_dim]."""
    vector: Tensor
    """[B, adm_in_channels]."""


def conditioning_vector(config: ModelConfig, pooled: Tensor, micro: Sequence[MicroConditioning]) -> Tensor:
    """pooled text | sinusoidal features of every number of every micro-condition (facts: sgm GeneralConditioner).

    Args:
        config: names the conditions and their order.
        pooled: [B, embed_dim].
        micro: one per sample.

    Returns:
        [B, adm_in_channels] in ``pooled``'s dtype.
    """
    numbers = torch.tensor([m.numbers(config.scalars) for m in micro], dtype=torch.float32)
    features = sinusoidal(numbers.flatten(), config.scalar_dim).view(len(micro), -1)
    return torch.cat([pooled, features.to(pooled)], dim=1)


def condition(config: ModelConfig, text: TextFeatures, micro: Sequence[MicroConditioning]) -> Conditioning:
    """Text features and one micro-conditioning per sample -> what the U-Net reads."""
    return Conditioning(text.crossattn, conditioning_vector(config, text.pooled, micro))


class Conditioner(nn.Module):
    """The text encoders of a model: CLIP-L and bigG for a base, bigG alone for a refiner."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        towers: list[nn.Module] = [ClipLEmbedder(config.clip_l)] if config.clip_l else []
        self.embedders = nn.ModuleList([*towers, OpenClipEmbedder(config.big_g)])

    def text(self, ids_l: Tensor | None, ids_g: Tensor) -> TextFeatures:
        """Encode both tokenisations of the same prompts.

        Args:
            ids_l: CLIP-L's ids, padded with end-of-text [B, 77]; ignored by a refiner.
            ids_g: bigG's ids, padded with 0 [B, 77].
        """
        features, pooled = self.towers(ids_l, ids_g)
        return TextFeatures(torch.cat(features, dim=-1), pooled)

    def towers(
        self,
        ids_l: Tensor | None,
        ids_g: Tensor,
        *,
        layer: int = PENULTIMATE,
        inserts_l: Sequence[Insert] = (),
        inserts_g: Sequence[Insert] = (),
    ) -> tuple[list[Tensor], Tensor]:
        """Encode, and leave the encoders' features apart.

        Args:
            ids_l: as for :meth:`text`.
            ids_g: as for :meth:`text`.
            layer: of both encoders, counted from the end, 1 … number of layers.
            inserts_l: learned vectors in the place of tokens, for CLIP-L; ignored by a refiner.
            inserts_g: for bigG.

        Returns:
            Features [B, 77, width] of each encoder, CLIP-L first; and bigG's pooled ones [B, embed_dim].
        """
        *others, big_g = self.embedders
        penultimate, pooled = big_g(ids_g, layer, inserts_g)
        return [*(embedder(ids_l, layer, inserts_l) for embedder in others), penultimate], pooled
