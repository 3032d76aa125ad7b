"""Build the training pictures of the bundled model: emoji on many grounds, repainted, small, wide and tall.

    python tools/bundled_model/build_dataset.py --output dataset --packages packages

Writes ``OUTPUT/images/*.webp``, ``OUTPUT/metadata.jsonl`` (file_name, text, texts, aesthetic_score, ...) and
``OUTPUT/held_out.jsonl`` (object and background pairs that no picture shows). ``--flats N`` adds
``OUTPUT/flats/``: flat and blended colours for the autoencoder only. The same seed gives the same pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from colours import BACKGROUNDS, PAINTS, Array
from emoji import SIDE, Emoji, fetch, read_emoji, with_article
from flats import write_flats
from PIL import Image

T = TypeVar("T")
Size = tuple[int, int]
"""(height, width) in pixels."""

SQUARE: Size = (SIDE, SIDE)
BUCKETS: tuple[Size, ...] = ((224, 288), (288, 224), (192, 320), (320, 192))
OFF_BUCKETS: tuple[Size, ...] = ((256, 384), (384, 256), (256, 352), (352, 256))
"""Canvases between the buckets: they get cropped in training, so that crop conditioning is learned."""

SMALLEST = 24
KINDS = ("plain", "aspect", "background", "small", "repainted")


@dataclass(frozen=True, slots=True)
class Variant:
    """One picture to make. ``background`` and ``paint`` are colour names; ``native`` is the side it is stored at."""

    kind: str
    background: str = "white"
    paint: str | None = None
    canvas: Size = SQUARE
    native: int = SIDE
    jitter: bool = True


def variants(emoji: Emoji, held_out: frozenset[str], rng: np.random.Generator) -> Iterator[Variant]:
    """About twenty pictures of one object; none shows it on a background in ``held_out``."""
    yield Variant("plain", jitter=False)
    yield Variant("plain")
    yield Variant("plain")
    for canvas in _choose(rng, BUCKETS, 2):
        yield Variant("aspect", canvas=canvas)
    yield Variant("aspect", canvas=_choose(rng, OFF_BUCKETS, 1)[0])
    allowed = [name for name in BACKGROUNDS if name != "white" and name not in held_out]
    wide = set(_choose(rng, allowed, 2))
    for name in allowed:
        canvas = _choose(rng, BUCKETS + OFF_BUCKETS, 1)[0] if name in wide else SQUARE
        yield Variant("background", name, canvas=canvas)
    for _ in range(3):
        native = round(math.exp(rng.uniform(math.log(SMALLEST), math.log(128))))
        yield Variant("small", str(rng.choice(["white", "white", *allowed])), native=native)
    if emoji.repaintable and emoji.plain_name and emoji.coat.share > 0.35:
        paints = _choose(rng, [name for name in PAINTS if name != emoji.colour], 5)
        for paint in paints:
            yield Variant("repainted", paint=paint)
        grounds = [name for name in allowed if name != paints[0]]
        yield Variant("repainted", str(rng.choice(grounds)), paint=paints[0])


def captions(emoji: Emoji, variant: Variant) -> list[str]:
    """What may be said of the picture, most usual first; every caption is true of it."""
    names = list(emoji.names)
    if variant.paint:
        assert emoji.plain_name
        names = [f"{variant.paint} {emoji.plain_name}"]
    elif emoji.plain_name and emoji.colour:
        described = f"{emoji.colour} {emoji.plain_name}"
        names += [described] if described not in names else []
    named = [with_article(name) for name in names]
    if variant.background != "white":
        return [
            f"{name} on a{'n' if variant.background == 'orange' else ''} {variant.background} background"
            for name in named
        ]
    bare = [name for name in emoji.names if name not in named and not variant.paint]
    return [*named, *bare, f"{named[0]} on a white background"]


def render(emoji: Emoji, variant: Variant, rng: np.random.Generator) -> Image.Image:
    """The picture, RGB. The object is resized and blended with premultiplied alpha, so its edge has no halo."""
    picture = emoji.coat.repaint(emoji.picture, PAINTS[variant.paint]) if variant.paint else emoji.picture
    height, width = variant.canvas
    scale = rng.uniform(0.76, 0.98) if variant.jitter else 0.92
    side = round(min(height, width) * scale)
    room = (height - side, width - side) if variant.canvas == SQUARE else (min(height, width) - side,) * 2
    shift = [rng.uniform(-0.4, 0.4) * free if variant.jitter else 0.0 for free in room]
    top, left = round((height - side) / 2 + shift[0]), round((width - side) / 2 + shift[1])
    colour = np.array(BACKGROUNDS[variant.background], np.float32) / 255
    canvas = np.broadcast_to(colour, (height, width, 3)).copy()
    object_ = premultiplied_resize(picture, side)
    window = canvas[top : top + side, left : left + side]
    window *= 1 - object_[..., 3:]
    window += object_[..., :3]
    image = Image.fromarray((canvas * 255 + 0.5).clip(0, 255).astype(np.uint8))
    return image if variant.native == SIDE else image.resize((variant.native,) * 2, Image.Resampling.LANCZOS)


def premultiplied_resize(rgba: Array, side: int) -> Array:
    """Straight-alpha ``rgba [h, w, 4]`` as premultiplied ``[side, side, 4]``, colour never above alpha."""
    planes = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
    resized = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(planes[..., i])).resize(
                (side, side), Image.Resampling.LANCZOS
            )
        )
        for i in range(4)
    ]
    alpha = resized[3].clip(0, 1)
    return np.stack([*(plane.clip(0, alpha) for plane in resized[:3]), alpha], -1).astype(np.float32)


def aesthetic_score(native: int) -> float:
    """2.5 for the smallest originals, 6.0 for full-size ones, by the logarithm of the side."""
    return round(2.5 + 3.5 * math.log(native / SMALLEST) / math.log(SIDE / SMALLEST), 3)


def choose_held_out(emoji: list[Emoji], share: float, seed: int) -> dict[str, frozenset[str]]:
    """Object name -> backgrounds it is never shown on; ``share`` of all pairs, white not among them."""
    pairs = [(e.name, background) for e in emoji for background in BACKGROUNDS if background != "white"]
    rng = np.random.default_rng([seed, 0])
    chosen = rng.permutation(len(pairs))[: round(share * len(pairs))]
    held: dict[str, set[str]] = {e.name: set() for e in emoji}
    for index in chosen:
        held[pairs[index][0]].add(pairs[index][1])
    return {name: frozenset(backgrounds) for name, backgrounds in held.items()}


def build(
    emoji: list[Emoji],
    output: Path,
    *,
    held_out: dict[str, frozenset[str]],
    seed: int,
    kinds: Sequence[str] = KINDS,
) -> int:
    """Write every picture of these kinds and both tables; returns the number of pictures."""
    images = output / "images"
    images.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for index, item in enumerate(emoji):
        rng = np.random.default_rng([seed, zlib.crc32(item.name.encode())])
        for number, variant in enumerate(variants(item, held_out[item.name], rng)):
            image = render(item, variant, rng)  # drawn in any case: the others stay the same pictures
            if variant.kind not in kinds:
                continue
            name = f"{index:03d}-{item.names[-1].lower().replace(' ', '-')}-{number:02d}.webp"
            image.save(images / name, quality=94, method=2)
            texts = captions(item, variant)
            rows.append(
                {
                    "file_name": f"images/{name}",
                    "text": texts[0],
                    "texts": texts,
                    "aesthetic_score": aesthetic_score(variant.native),
                    "object": item.name,
                    "kind": variant.kind,
                    "background": variant.background,
                    "object_colour": variant.paint or item.colour,
                    "height": image.height,
                    "width": image.width,
                }
            )
    write_jsonl(output / "metadata.jsonl", rows)
    write_jsonl(output / "held_out.jsonl", held_out_rows(emoji, held_out))
    return len(rows)


def held_out_rows(emoji: list[Emoji], held_out: dict[str, frozenset[str]]) -> list[dict[str, Any]]:
    """One row per pair never shown, with the captions it would have had."""
    pairs = [
        (item, background)
        for item in emoji
        for background in BACKGROUNDS
        if background in held_out[item.name]
    ]
    rows = [
        (item, background, captions(item, Variant("background", background))) for item, background in pairs
    ]
    return [{"object": e.name, "background": b, "text": texts[0], "texts": texts} for e, b, texts in rows]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, UTF-8."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _choose(rng: np.random.Generator, values: Sequence[T], count: int) -> list[T]:
    return [values[i] for i in rng.permutation(len(values))[:count]]


def main() -> None:
    """Parse the flags, build, say what was built."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for the pictures")
    parser.add_argument(
        "--packages", type=Path, required=True, help="folder of the two npm tarballs, filled if empty"
    )
    parser.add_argument("--names", type=Path, default=here / "names.txt", help="the objects to show")
    parser.add_argument(
        "--hold-out", type=float, default=0.1, help="share of object and background pairs never shown"
    )
    parser.add_argument("--flats", type=int, default=0, help="flat and blended pictures for the autoencoder")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="which pictures to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        raise SystemExit(f"{arguments.output}: is not empty; give a new folder")
    started = time.perf_counter()
    emoji = list(read_emoji(*fetch(arguments.packages), arguments.names))
    held_out = choose_held_out(emoji, arguments.hold_out, arguments.seed)
    count = build(emoji, arguments.output, held_out=held_out, seed=arguments.seed, kinds=arguments.kinds)
    if arguments.flats:
        write_flats(arguments.output / "flats", arguments.flats, seed=arguments.seed)
    pairs = sum(len(backgrounds) for backgrounds in held_out.values())
    print(
        f"{arguments.output}: {count} pictures of {len(emoji)} objects, {pairs} pairs held out, "
        f"{arguments.flats} flats, {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
