"""The pictures of a manifest, decoded once and kept while there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from sdxl_cli.data.loader import read_image
from sdxl_cli.data.manifest import Manifest, Row


class ManifestImages(Sequence[Tensor]):
    """Item i is the training pixels of the i-th row, float32 [3, H, W] in -1 … 1."""

    def __init__(self, rows: Sequence[tuple[Manifest, Row]], keep_bytes: int = 2 << 30) -> None:
        """Args:
        rows: kept rows, each with the manifest it is from.
        keep_bytes: how much of the decoded pictures stays in memory, as bytes of uint8.
        """
        self.rows = rows
        self._room = keep_bytes
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def spread(self, count: int) -> ManifestImages:
        """At most so many, evenly spread; decoded when it is their turn, and not kept."""
        few = min(count, len(self))
        return ManifestImages([self.rows[i * len(self) // few] for i in range(few)], keep_bytes=0)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        kept = self._kept.get(index)
        if kept is not None:
            return kept.float().div(127.5).sub(1.0)
        image = read_image(*self.rows[index])
        if self._room >= image.numel():
            self._room -= image.numel()
            self._kept[index] = image.add(1.0).mul(127.5).round().to(torch.uint8)
        return image
