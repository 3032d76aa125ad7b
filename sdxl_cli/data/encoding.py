"""Filling caches with what a model's autoencoder and text encoders make of a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sdxl_cli.data.cache import Encode, EncodeText, LatentCache, TextCache
from sdxl_cli.data.loader import read_image
from sdxl_cli.data.manifest import Manifest, Row
from sdxl_cli.model.conditioning import Conditioner, TextFeatures
from sdxl_cli.model.vae import Autoencoder

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""captions -> token ids of CLIP-L and of bigG, each ``[B, 77]``."""


def encoder_of(vae: Autoencoder) -> Encode:
    """What the autoencoder makes of pictures, on its device and in its precision."""
    like = next(vae.parameters())

    @torch.no_grad()
    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        moments = vae.encode(images.to(like.device, like.dtype))
        return moments.mean, moments.logvar

    return encode


def text_encoder_of(encoders: Conditioner, tokenize: Tokenize) -> EncodeText:
    """What the text encoders make of captions; of long ones, of the first 75 tokens."""
    device = next(encoders.parameters()).device

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> TextFeatures:
        ids_l, ids_g = tokenize(captions)
        return encoders.text(ids_l.to(device), ids_g.to(device))

    return encode


def fill_latents(
    cache: LatentCache,
    manifest: Manifest,
    vae: Autoencoder,
    *,
    rows: Sequence[Row] | None = None,
    batch_size: int = 8,
    shard_items: int = 512,
    workers: int = 1,
) -> Iterator[int]:
    """Encode every crop that is not cached yet; yields how many were added after each batch.

    ``rows`` are those looked at, of the kept ones; None is all. Pictures
    are read ahead by ``workers`` threads while the autoencoder works.

    Raises:
        NumericError, FileError: see :meth:`LatentCache.fill`.
    """
    return cache.fill(
        manifest.kept if rows is None else rows,
        lambda row: read_image(manifest, row),
        encoder_of(vae),
        batch_size=batch_size,
        shard_items=shard_items,
        workers=workers,
    )


def fill_text(
    cache: TextCache,
    manifest: Manifest,
    encode: EncodeText,
    *,
    batch_size: int = 32,
    shard_items: int = 512,
) -> Iterator[int]:
    """Encode every caption that is not cached yet, and the empty one; yields how many were added after each batch.

    Raises:
        NumericError, FileError: see :meth:`TextCache.fill`.
    """
    captions = [caption for row in manifest.kept for caption in row.captions]
    return cache.fill(captions, encode, batch_size=batch_size, shard_items=shard_items)
