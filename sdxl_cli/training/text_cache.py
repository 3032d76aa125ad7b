"""Features of captions that were encoded once, in the place of text encoders that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sdxl_cli.console import get as console
from sdxl_cli.data.cache import TextCache, weights_hash
from sdxl_cli.data.encoding import Tokenize, text_encoder_of
from sdxl_cli.data.manifest import Manifest
from sdxl_cli.model.conditioning import Conditioner
from sdxl_cli.training.config import UNetTrainConfig

DTYPES = (torch.float16, torch.float32, torch.bfloat16)
"""What features may be stored in; the first is what a new cache has."""


def cached_text(
    folder: Path,
    encoders: Conditioner,
    manifests: Sequence[Manifest],
    config: UNetTrainConfig,
    tokenize: Tokenize,
) -> TextCache | None:
    """The cache that has the features of all captions; None when they are to be encoded as they come.

    Args:
        folder: of caches; what is missing is added to it when ``config.cache_text`` is ``fill``.
        encoders: as they were loaded, with the weights that make the features.
        manifests: whose captions are asked for.
        config: says whether encoders are trained, which leaves nothing to keep.
        tokenize: captions -> 77 token ids for each encoder.

    Raises:
        NumericError, FileError: see :meth:`~sdxl_cli.data.cache.TextCache.fill`.
    """
    if config.train_text_encoders or config.embedding.word or config.cache_text == "off":
        return None
    fills = config.cache_text == "fill"
    if not fills and not any(folder.glob("text-*.safetensors")):
        return None
    captions = {"", *(caption for one in manifests for row in one.kept for caption in row.captions)}
    digest = weights_hash(encoders.state_dict())
    caches = [TextCache(folder, digest, dtype=dtype) for dtype in DTYPES]
    cache = min(caches, key=lambda one: len(one.missing(captions)))
    missing = len(cache.missing(captions))
    if missing and not fills:
        console().warn(
            f"{folder} has no features of {missing} of {len(captions)} captions by these text encoders, so all are "
            "encoded as they come; run cache-dataset with this model, or give --set cache_text=fill"
        )
        return None
    with console().bar("encoding captions", total=missing) as bar:
        for added in cache.fill(sorted(captions), text_encoder_of(encoders, tokenize)):
            bar.advance(added)
    return cache
