"""The ten-hue test: does the autoencoder keep the colour of a background?

    python tools/bundled_model/hues.py --vae runs/vae/vae.safetensors --data squares.parquet

Twenty objects on each of the ten named backgrounds go through the autoencoder. The colour of the four
corners must still be nearest to the right one of the ten, and close to it. Exits with 1 when fewer than 98 %
are, or when the mean error is above 12 of 255.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from colours import BACKGROUNDS, nearest_background

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_vae
from sdxl_cli.data.loader import read_image
from sdxl_cli.data.manifest import Manifest, read_manifest
from sdxl_cli.model.vae import Autoencoder

CORNER = 24
"""Side, in pixels, of the squares that are looked at."""
ACCEPT_SHARE, ACCEPT_ERROR = 0.98, 12.0


def backgrounds(manifest: Manifest, count: int) -> dict[str, list[torch.Tensor]]:
    """Up to ``count`` pictures [3, H, W] for each named background, from those painted with it."""
    kinds = {}
    with (manifest.root / "metadata.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            kinds[row["file_name"]] = row["background"] if row["kind"] in ("background", "plain") else None
    found: dict[str, list[torch.Tensor]] = {name: [] for name in BACKGROUNDS}
    rows = sorted(manifest.kept, key=lambda row: row.sha256 or "")
    for row in rows:
        name = kinds.get(row.path)
        if name and row.stored_size == row.target_size and len(found[name]) < count:
            found[name].append(read_image(manifest, row))
    return found


def corners(image: torch.Tensor) -> np.ndarray:
    """Mean sRGB, 0 … 255, of the four corner squares of an image [3, H, W] in -1 … 1."""
    c = CORNER
    squares = [image[:, :c, :c], image[:, :c, -c:], image[:, -c:, :c], image[:, -c:, -c:]]
    pixels = torch.stack(squares).clamp(-1, 1).add(1).mul(127.5)
    return pixels.mean(dim=(0, 2, 3)).numpy()


@torch.no_grad()
def measure(vae: Autoencoder, pictures: dict[str, list[torch.Tensor]]) -> dict[str, dict[str, float]]:
    """For each background: the share that is still the nearest of ten, and the mean error of 255."""
    result = {}
    for name, images in pictures.items():
        after = [corners(vae.decode(vae.encode(image[None]).mode())[0]) for image in images]
        right = [nearest_background(colour) == name for colour in after]
        errors = [np.abs(colour - corners(image)).mean() for colour, image in zip(after, images, strict=True)]
        result[name] = {"share": float(np.mean(right)), "error": float(np.mean(errors)), "count": len(images)}
    return result


def main() -> None:
    """Run the test and print a table."""
    parser = argparse.ArgumentParser(description="The ten-hue round trip of an autoencoder.")
    parser.add_argument("--vae", required=True)
    parser.add_argument("--data", required=True, type=Path, help="manifest of 256-pixel squares")
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()
    vae = load_vae(locate(args.vae, "vae"), dtype=torch.float32)
    result = measure(vae, backgrounds(read_manifest(args.data), args.count))
    for name, row in result.items():
        print(
            f"{name:12s} {row['share']:.2f} kept, error {row['error']:5.1f} of 255, {row['count']:.0f} pictures"
        )
    share = float(np.mean([row["share"] for row in result.values()]))
    error = float(np.mean([row["error"] for row in result.values()]))
    print(f"{'all':12s} {share:.3f} kept, error {error:5.1f} of 255")
    raise SystemExit(0 if share >= ACCEPT_SHARE and error <= ACCEPT_ERROR else 1)


if __name__ == "__main__":
    main()
