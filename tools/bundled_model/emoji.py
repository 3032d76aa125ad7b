"""Microsoft's Fluent 3D emoji and their Unicode names, out of two npm packages (both MIT)."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from colours import BACKGROUNDS, Array, Coat
from PIL import Image

PACKAGES = {
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "unicode-emoji-json@0.9.0": (
        "unicode-emoji-json-0.9.0.tgz",
        "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    ),
}
"""npm name -> (file name that ``npm pack`` writes, sha256)."""

SIDE = 256
"""Width and height of the source pictures, in pixels."""

COLOUR_WORDS = frozenset(" ".join(BACKGROUNDS).split()) | {"brown", "grey", "golden"}
_UNCOUNTED = {
    *("corn", "spaghetti", "sushi", "popcorn", "broccoli", "bread", "cheese", "chocolate", "honey", "milk"),
    *("beer", "ice", "luggage", "yarn"),
}


@dataclass(frozen=True, slots=True)
class Emoji:
    """One object: its straight-alpha picture ``[256, 256, 4]`` in 0..1 and the names captions call it by."""

    name: str
    names: tuple[str, ...]
    picture: Array
    coat: Coat
    colour: str | None
    """What a person would call its colour; None when it has none, or the list says not to name it."""
    repaintable: bool

    @property
    def plain_name(self) -> str | None:
        """The last name without a colour word, or None: what a repainted one may be called."""
        plain = [name for name in self.names if not COLOUR_WORDS & set(name.lower().split())]
        return plain[-1] if plain else None


def with_article(phrase: str) -> str:
    """``a cat``, ``an orange guitar``, ``jeans``: the article that the phrase takes, if any."""
    head = phrase
    for joint in (" of ", " with ", " showing ", " behind ", " and "):
        head = head.split(joint)[0]
    noun = head.split()[-1].lower()
    plural = noun.endswith("s") and not noun.endswith(("ss", "us"))
    if plural or noun in _UNCOUNTED:
        return phrase
    vowel = phrase[0].lower() in "aeiou" and not phrase.lower().startswith(("uni", "ufo", "eu"))
    return f"{'an' if vowel else 'a'} {phrase}"


def fetch(folder: Path) -> tuple[Path, Path]:
    """The two package files in ``folder``, packed by npm when they are not there.

    Raises:
        SystemExit: npm fails, or a file is not the one this recipe was written for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for package, (name, sha256) in PACKAGES.items():
        path = folder / name
        if not path.exists():
            subprocess.run(["npm", "pack", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != sha256:
            raise SystemExit(f"{path}: sha256 is {actual}, expected {sha256}; delete it and run again")
        found.append(path)
    return found[0], found[1]


def read_emoji(images: Path, names: Path, wanted: Path) -> Iterator[Emoji]:
    """The emoji listed in ``wanted``, in its order, joined to the pictures by code points without U+FE0F.

    Raises:
        SystemExit: a listed name is unknown, or has no picture.
    """
    with tarfile.open(names) as archive:
        table = json.load(_member(archive, "package/data-by-emoji.json"))
    points = {
        entry["name"]: tuple(f"{ord(c):x}" for c in text if ord(c) != 0xFE0F) for text, entry in table.items()
    }
    with tarfile.open(images) as archive:
        files = {
            tuple(p for p in Path(m.name).stem.split("-") if p != "fe0f"): m.name
            for m in archive.getmembers()
            if m.name.endswith(".webp")
        }
        for line in wanted.read_text(encoding="utf-8").splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            name, called = parse_line(line)
            key = points.get(name)
            if key is None or key not in files:
                raise SystemExit(f"{wanted}: {name!r} is not an emoji with a picture")
            picture = Image.open(io.BytesIO(_member(archive, files[key]).read())).convert("RGBA")
            pixels = np.asarray(picture.crop((0, 0, SIDE, SIDE)), np.float32) / np.float32(255)
            coat, free = Coat.of(pixels), not line.startswith("!")
            yield Emoji(name, called, pixels, coat, coat.natural_colour() if free else None, free)


def parse_line(line: str) -> tuple[str, tuple[str, ...]]:
    """``"! a = b | c"`` -> its CLDR name and the names that captions use (the CLDR name first, unless ``=``)."""
    cldr, equals, called = line.lstrip("! ").partition("=")
    names = tuple(part.strip() for part in (called if equals else cldr).split("|"))
    return (cldr.strip() if equals else names[0]), names


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    member = archive.extractfile(name)
    if member is None:
        raise SystemExit(f"{archive.name!s}: {name} is not a file")
    return member
