"""The networks that measure, found before any work begins and loaded when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_cli.checkpoint.files import remembered_sha256
from sdxl_cli.evaluation.pictures import Pixels
from sdxl_cli.metrics.clip import Clip, find_clip, load_clip
from sdxl_cli.metrics.inception import (
    CLASSES,
    FEATURES,
    Inception,
    Resize,
    find_inception,
    load_inception,
    resized,
)
from sdxl_cli.metrics.lpips import LPIPS, Net, load_lpips


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkFlags:
    """Where the user says they are, and how they are used."""

    inception_weights: Path | None = None
    resize: Resize = "tf1"
    """How pictures become 299x299 for the Inception network."""
    lpips_weights: tuple[Path, ...] = ()
    lpips_net: Net = "vgg"
    clip_model: str | None = None
    clip_weights: Path | None = None
    device: str = "cpu"
    """As torch names it."""


class Networks:
    """Those of one run."""

    def __init__(
        self, flags: NetworkFlags, *, inception: bool = False, lpips: bool = False, clip: bool = False
    ) -> None:
        """Find the ones that are wanted.

        Raises:
            NetworkError, FileError, UsageError: one is not to be had; the text says what to get.
        """
        self.flags = flags
        self.inception_file = find_inception(flags.inception_weights) if inception else None
        self.clip_files = find_clip(flags.clip_model, flags.clip_weights) if clip else None
        # small enough, and in parts, so that looking is loading
        self.lpips: LPIPS | None = None
        if lpips:
            self.lpips = load_lpips(flags.lpips_net, flags.lpips_weights).to(flags.device)

    @cached_property
    def inception(self) -> Inception:
        """FID's network."""
        assert self.inception_file is not None
        return load_inception(self.inception_file).to(self.flags.device)

    @cached_property
    def clip(self) -> Clip:
        """CLIP."""
        assert self.clip_files is not None
        return load_clip(self.clip_files, self.flags.device)

    @torch.inference_mode()
    def features(self, pictures: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        """Inception's features [B, 2048] and logits [B, 1008] on the CPU; without pictures, none."""
        if not pictures:
            return torch.zeros(0, FEATURES), torch.zeros(0, CLASSES)
        inputs = torch.stack([resized(pixels, self.flags.resize) for pixels in pictures])
        features, logits = self.inception(inputs.to(self.flags.device))
        return features.cpu(), logits.cpu()

    def settings(self) -> dict[str, Any]:
        """Which networks they are, for the record: other weights give other numbers."""
        found: dict[str, Any] = {}
        if self.inception_file is not None:
            found["inception"] = {
                "sha256": remembered_sha256(self.inception_file),
                "resize": self.flags.resize,
            }
        if self.lpips is not None:
            found["lpips"] = {"net": self.flags.lpips_net, "sha256": self.lpips.digest()}
        if self.clip_files is not None:
            found["clip"] = self.clip_files.describe()
        return found


def to_images(pictures: Sequence[Pixels]) -> Tensor:
    """[B, 3, H, W] float32 in -1 … 1 of pictures of one size."""
    return (
        torch.stack([torch.from_numpy(pixels.copy()).permute(2, 0, 1) for pixels in pictures]).float() / 127.5
        - 1
    )


def to_levels(images: Tensor) -> list[Pixels]:
    """[B, 3, H, W] in -1 … 1 as pictures of 8 bits, as a file would hold them."""
    levels = ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return [image.permute(1, 2, 0).contiguous().numpy() for image in levels.cpu()]


def scattered(rows: Tensor, used: Tensor) -> Tensor:
    """Rows of the pictures that could be used, with NaN between for the others: [len(used), …]."""
    found = torch.full((len(used), *rows.shape[1:]), float("nan"), dtype=rows.dtype)
    found[used.bool()] = rows
    return found
