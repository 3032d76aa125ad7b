"""What the bundled model can do, measured: is the thing asked for shown, in its own colours, on its ground?

    python tools/bundled_model/evaluate.py --model FILE --data dataset --output report [--objects 60]

Makes "a {name}" for objects spread over the list and compares each picture, at 32 x 32 pixels, with the plain
picture of every object (retrieval: is the nearest one the right one?); makes "a {name} on a {colour} background"
for pairs that no training picture shows, and looks at the corners. Writes a contact sheet and a JSON file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from colours import nearest_background
from PIL import Image

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.console import Console, configure
from sdxl_cli.generation.device import pick_device
from sdxl_cli.generation.pipeline import Models, generate
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.weights import FileWeights

SMALL = 32
COLUMNS = 12
TILE = 128


def references(data: Path) -> dict[str, np.ndarray]:
    """The first plain picture of every object, float [32, 32, 3] in 0 … 1."""
    found: dict[str, np.ndarray] = {}
    for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "plain" and row["object"] not in found:
            found[row["object"]] = small(np.asarray(Image.open(data / row["file_name"]).convert("RGB")))
    return found


def small(pixels: np.ndarray) -> np.ndarray:
    """RGB [H, W, 3] uint8 -> [32, 32, 3] in 0 … 1."""
    return np.asarray(Image.fromarray(pixels).resize((SMALL, SMALL), Image.Resampling.BOX)) / 255.0


def make(
    weights: FileWeights, prompts: list[str], seed: int, args: argparse.Namespace, console: Console
) -> Iterator[np.ndarray]:
    """A picture for each prompt, uint8 [256, 256, 3]."""
    for prompt in console.progress(prompts, "generating"):
        request = GenerateRequest(
            prompt=prompt,
            seed=seed,
            steps=args.steps,
            cfg_scale=args.cfg_scale,
            sampler="dpmpp_2m",
            scheduler="karras",
        )
        plan = plan_generation(request, weights.files.config)
        yield from (picture.pixels for picture in generate(plan, Models(base=weights), Silent()))


class Silent:
    """Hears of every step and says nothing: the bar counts pictures."""

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def progress(self, items, description, *, total=None):  # type: ignore[no-untyped-def]
        """The items."""
        return iter(range(items) if isinstance(items, int) else items)


def sheet(pictures: list[np.ndarray], path: Path) -> None:
    """Write the pictures as rows of twelve."""
    rows = -(-len(pictures) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * TILE, rows * TILE), "white")
    for index, pixels in enumerate(pictures):
        tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
        canvas.paste(tile, (index % COLUMNS * TILE, index // COLUMNS * TILE))
    canvas.save(path)


def corner_colour(pixels: np.ndarray) -> tuple[float, float, float]:
    """Mean sRGB of the four corners, 24 pixels each."""
    c = 24
    squares = [pixels[:c, :c], pixels[:c, -c:], pixels[-c:, :c], pixels[-c:, -c:]]
    r, g, b = np.concatenate([s.reshape(-1, 3) for s in squares]).mean(0)
    return float(r), float(g), float(b)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--objects", type=int, default=60)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg-scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = configure()
    files = locate(args.model, "base")
    import torch

    weights = FileWeights(
        files, device=pick_device("cpu"), dtype=torch.float32, vae_dtype=torch.float32, stays=True
    )
    known = references(args.data)
    names = list(known)[:: max(1, len(known) // args.objects)][: args.objects]
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = list(make(weights, [f"a {name}" for name in names], args.seed, args, console))
    table = np.stack(list(known.values())).reshape(len(known), -1)
    ranks = []
    for name, pixels in zip(names, pictures, strict=True):
        distances = ((table - small(pixels).reshape(1, -1)) ** 2).mean(1)
        ranks.append(int((distances < distances[list(known).index(name)]).sum()))
    held = [json.loads(line) for line in (args.data / "held_out.jsonl").read_text().splitlines()]
    pairs = [row for row in held if row["object"] in names][: args.objects // 2]
    grounds = list(
        make(
            weights,
            [f"a {p['object']} on a {p['background']} background" for p in pairs],
            args.seed,
            args,
            console,
        )
    )
    right = [
        nearest_background(corner_colour(g)) == p["background"] for g, p in zip(grounds, pairs, strict=True)
    ]
    result = {
        "objects": len(names),
        "top1": float(np.mean([r == 0 for r in ranks])),
        "top5": float(np.mean([r < 5 for r in ranks])),
        "unseen_pairs": len(pairs),
        "background_right": float(np.mean(right)) if right else None,
        "missed": [name for name, rank in zip(names, ranks, strict=True) if rank],
    }
    sheet(pictures + grounds, args.output / "sheet.png")
    (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
