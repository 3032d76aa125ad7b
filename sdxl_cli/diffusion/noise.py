"""Random numbers: one stream per image, on the CPU, so that neither device nor batch size changes a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NoiseStreams:
    """Independent standard normal noise for each image of a batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def next(self, shape: Sequence[int]) -> Tensor:
        """The next noise of every image.

        Args:
            shape: of one image, (C, h, w).

        Returns:
            float32 [B, C, h, w] on the CPU.
        """
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators])
