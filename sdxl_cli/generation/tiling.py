"""The autoencoder in overlapping tiles: less memory, for a result that is nearly the same.

A tile's group norms see that tile alone, so its colours may differ a little from its neighbours'. The overlap is
wide, and tiles fade into each other across all of it, so that such differences become slow changes and no edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

TILE = 64
"""Side of a tile in latents: 512 pixels for SDXL."""
SMALLEST_TILE = 16
OVERLAP = 0.25
"""Share of a tile's side that it has in common with the next one."""

Span = tuple[int, int]
"""First and one past the last."""


def spans(length: int, tile: int) -> list[Span]:
    """Where tiles lie along a side: as few as cover it, evenly, with at least the overlap in common."""
    if length <= tile:
        return [(0, length)]
    step = tile - int(tile * OVERLAP)
    count = -(-(length - tile) // step) + 1
    starts = [round(index * (length - tile) / (count - 1)) for index in range(count)]
    return [(start, start + tile) for start in starts]


def decoded_in_tiles(decode: Callable[[Tensor], Tensor], latent: Tensor, *, factor: int, tile: int) -> Tensor:
    """Latents [1, z, h, w] to an image [1, c, f·h, f·w] on the CPU, fp32.

    Args:
        decode: the autoencoder's.
        latent: unscaled latents.
        factor: pixels per latent.
        tile: side of a tile in latents.
    """
    height, width = latent.shape[2:]
    pieces = (
        (place, decode(latent[:, :, place[0][0] : place[0][1], place[1][0] : place[1][1]]))
        for place in product(spans(height, tile), spans(width, tile))
    )
    return _joined(pieces, (height, width), factor)


def encoded_in_tiles(encode: Callable[[Tensor], Tensor], image: Tensor, *, factor: int, tile: int) -> Tensor:
    """An image [1, 3, f·h, f·w] to what ``encode`` makes of it [1, c, h, w] on the CPU, fp32.

    Arguments as for :func:`decoded_in_tiles`.
    """
    height, width = image.shape[2] // factor, image.shape[3] // factor
    pieces = (
        ((rows, columns), encode(_cut(image, rows, columns, factor)))
        for rows, columns in product(spans(height, tile), spans(width, tile))
    )
    return _joined(pieces, (height, width), 1)


def _cut(image: Tensor, rows: Span, columns: Span, factor: int) -> Tensor:
    top, bottom, left, right = (edge * factor for edge in (*rows, *columns))
    return image[:, :, top:bottom, left:right]


def _joined(pieces: Iterator[tuple[tuple[Span, Span], Tensor]], size: Span, scale: int) -> Tensor:
    """Lay pieces over each other, each with a weight that falls towards edges it shares with another."""
    height, width = size
    total: Tensor | None = None
    weight = torch.zeros(1, 1, height * scale, width * scale)
    for (rows, columns), piece in pieces:
        values = piece.float().cpu()
        if total is None:
            total = torch.zeros(1, values.shape[1], height * scale, width * scale)
        fade = _fade(rows, height, scale)[:, None] * _fade(columns, width, scale)[None, :]
        top, bottom, left, right = (edge * scale for edge in (*rows, *columns))
        total[:, :, top:bottom, left:right] += values * fade
        weight[:, :, top:bottom, left:right] += fade
    assert total is not None
    return total / weight


def _fade(span: Span, length: int, scale: int) -> Tensor:
    """Weights along a side: rising over the overlap where another tile lies before, falling where one lies after."""
    size = (span[1] - span[0]) * scale
    reach = max(1, int(size * OVERLAP))
    ramp = (torch.arange(size, dtype=torch.float32) + 0.5) / reach
    up = ramp.clamp(max=1) if span[0] > 0 else torch.ones(size)
    down = ramp.flip(0).clamp(max=1) if span[1] < length else torch.ones(size)
    return torch.minimum(up, down)
