"""Prompts to the features that the U-Net reads: chunks through the text encoders, weighted, and joined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from sdxl_cli.errors import UsageError
from sdxl_cli.generation import emphasis
from sdxl_cli.generation.chunks import Chunk
from sdxl_cli.generation.prompt import PAD_BIG_G, PAD_CLIP_L
from sdxl_cli.generation.reading import Reader
from sdxl_cli.model.conditioning import Conditioner, TextFeatures
from sdxl_cli.model.config import ModelConfig
from sdxl_cli.model.text import Insert

_TOWERS = (("clip_l", PAD_CLIP_L), ("clip_g", PAD_BIG_G))
"""Of each text encoder, its half of a learned embedding and what fills a row after the end token."""


def encode_text(
    encoders: Conditioner, text: str, text_2: str | None, device: torch.device, reader: Reader | None = None
) -> TextFeatures:
    """Features of one text of k chunks [1, 77·k, ctx], and the pooled ones of the first chunk [1, embed].

    The pooled features are what A1111 and ComfyUI take too; they have no weights. When the two encoders read texts of
    different length, the shorter one is followed by empty chunks, as in ComfyUI.

    Args:
        encoders: a model's.
        text: as typed.
        text_2: what bigG reads; None: the same.
        device: where the encoders are.
        reader: how texts are read; None: as by default.

    Raises:
        UsageError, FileError: as :meth:`Reader.chunks`.
    """
    reader = reader or Reader()
    texts = [text, text if text_2 is None else text_2][-len(encoders.embedders) :]
    read = [reader.chunks(one) for one in texts]
    length = max(len(chunks) for chunks in read)
    read = [[*chunks, *[Chunk()] * (length - len(chunks))] for chunks in read]
    features, pooled = _run(encoders, read, device, reader)
    weights = [torch.tensor([chunk.weights() for chunk in chunks], device=device) for chunks in read]
    if reader.syntax == "a1111":
        features = [emphasis.a1111(x, w, reader.emphasis) for x, w in zip(features, weights, strict=True)]
    elif any(bool((w != 1).any()) for w in weights):
        empty, _ = _run(encoders, [[Chunk()] for _ in read], device, reader)
        features = [emphasis.comfy(x, w, e) for x, w, e in zip(features, weights, empty, strict=True)]
    crossattn = rearrange(torch.cat(features, dim=-1), "chunk token width -> 1 (chunk token) width")
    return TextFeatures(crossattn, pooled[:1])


def of_one_length(first: TextFeatures, second: TextFeatures) -> tuple[TextFeatures, TextFeatures]:
    """The same two conditions with as many tokens each, so that they can be computed together.

    Each is repeated as a whole, up to the least common multiple. Attention over the same keys several times is
    attention over them once, so that neither condition depends on the length of the other (comfy/conds.py of ComfyUI
    does the same; A1111 computes the two one after the other).
    """
    length = math.lcm(first.crossattn.shape[1], second.crossattn.shape[1])

    def repeated(features: TextFeatures) -> TextFeatures:
        times = length // features.crossattn.shape[1]
        return TextFeatures(repeat(features.crossattn, "b t c -> b (n t) c", n=times), features.pooled)

    return repeated(first), repeated(second)


def require_readable(texts: Mapping[str, str], reader: Reader, config: ModelConfig) -> None:
    """Refuse what a model's text encoders cannot read, before they are loaded.

    Raises:
        UsageError: the layer counted from the end is beyond the first.
        FileError: a text mentions an embedding whose vectors are not as wide as the model's.
    """
    layers = min(tower.layers for tower in (config.clip_l, config.big_g) if tower is not None)
    if reader.layer > layers:
        raise UsageError(f"--clip-skip {reader.layer}: this model's text encoders allow 1 … {layers}")
    for name in reader.embeddings(texts):
        reader.book[name].require_fit(config)


def _run(
    encoders: Conditioner, read: Sequence[Sequence[Chunk]], device: torch.device, reader: Reader
) -> tuple[list[Tensor], Tensor]:
    """Encode the chunks of each encoder; ``read`` has as many members as there are encoders."""
    towers = _TOWERS[-len(read) :]
    ids = [
        torch.tensor([chunk.row(padding) for chunk in chunks], device=device)
        for chunks, (_, padding) in zip(read, towers, strict=True)
    ]
    inserts = [
        [
            Insert(row, position, getattr(reader.book[vector.name], half)[vector.index])
            for row, chunk in enumerate(chunks)
            for position, vector in chunk.vectors()
        ]
        for chunks, (half, _) in zip(read, towers, strict=True)
    ]
    return encoders.towers(
        ids[0] if len(ids) > 1 else None,
        ids[-1],
        layer=reader.layer,
        inserts_l=inserts[0],
        inserts_g=inserts[-1],
    )
