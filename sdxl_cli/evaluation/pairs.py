"""Two sets of pictures, pair by pair: PSNR, SSIM and LPIPS of what is in files already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch

from sdxl_cli.errors import FileError
from sdxl_cli.evaluation.networks import Networks, scattered
from sdxl_cli.evaluation.pictures import Pictures, Pixels
from sdxl_cli.evaluation.reconstruction import pair_columns, too_small
from sdxl_cli.evaluation.table import USED, Columns, Table


def compared(
    pictures: Pictures,
    others: Pictures,
    networks: Networks,
    folder: Path,
    *,
    metrics: Sequence[str],
    batch: int,
) -> Table:
    """Measure every picture against the one of the same name, whatever the suffix; goes on where it stopped.

    Args:
        pictures: what is measured.
        others: what they should be; may hold more.
        networks: have what the metrics need.
        folder: of the table.
        metrics: some of ``psnr``, ``ssim``, ``lpips``.
        batch: pictures at once, where all have one size.

    Raises:
        FileError: a picture has no partner, one of another size or too small a side, or the folder was begun with
            other settings.
    """
    numbers = _partners(pictures, others)
    settings = {
        **pictures.settings(),
        **networks.settings(),
        "others": others.settings(),
        "metrics": sorted(metrics),
        "batch": batch,
    }
    table = Table(folder, len(pictures), settings)

    def compute(rows: range) -> Columns:
        pairs = list(zip(pictures.load(rows), others.load([numbers[row] for row in rows]), strict=True))
        used = torch.tensor([one is not None and other is not None for one, other in pairs])
        parts = []
        for row, (one, other) in zip(rows, pairs, strict=True):
            if one is None or other is None:
                continue
            _require_comparable(pictures.items[row].path, one, other, metrics, networks)
            # one by one: pictures may differ in size from pair to pair
            parts.append(pair_columns([one], [other], networks, metrics))
        empty = pair_columns([], [], networks, metrics)
        columns = {
            name: torch.cat([part[name] for part in parts]) if parts else empty[name] for name in empty
        }
        return {USED: used.to(torch.uint8)} | {name: scattered(part, used) for name, part in columns.items()}

    table.fill(compute, batch=batch, description="pairs")
    pictures.require_some(table.unusable())
    return table


def _require_comparable(
    path: str, one: Pixels, other: Pixels, metrics: Sequence[str], networks: Networks
) -> None:
    """Refuse a pair that differs in size, or is too small for a metric."""
    if one.shape != other.shape:
        sizes = " and ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (one, other))
        raise FileError(f"{path}: the pair is {sizes}; give --size to bring both to one")
    if short := too_small(min(one.shape[:2]), metrics, networks):
        raise FileError(
            f"{path} is {one.shape[1]}x{one.shape[0]}, {short}; give a larger --size, or other --metrics"
        )


def _partners(pictures: Pictures, others: Pictures) -> list[int]:
    """The number, among the others, of the picture with the same name."""
    partners = {_stem(item.path): number for number, item in enumerate(others.items)}
    missing = [item.path for item in pictures.items if _stem(item.path) not in partners]
    if missing:
        raise FileError(
            f"{others.source}: has no picture for {missing[0]} ({len(missing)} of {len(pictures)} lack one)"
        )
    return [partners[_stem(item.path)] for item in pictures.items]


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
