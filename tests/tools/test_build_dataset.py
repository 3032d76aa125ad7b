"""The recipe of the bundled model's training pictures, on an object made here instead of the real packages."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bundled_model"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("build_dataset")


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("colours")


def disc(rgb: tuple[float, float, float]) -> np.ndarray:
    """A soft-edged disc, straight alpha; the colour under transparent pixels is a green that must never show."""
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    alpha = np.clip((0.8 - np.hypot(x, y)) * 40, 0, 1)
    picture = np.zeros((256, 256, 4), np.float32)
    picture[..., :3] = np.where(alpha[..., None] > 0, rgb, (0, 1, 0))
    picture[..., 3] = alpha
    return picture


def ball(tool: Any, rgb: tuple[float, float, float], names: tuple[str, ...]) -> Any:
    emoji = importlib.import_module("emoji")
    picture = disc(rgb)
    coat = importlib.import_module("colours").Coat.of(picture)
    return emoji.Emoji(names[0], names, picture, coat, coat.natural_colour(), True)


def test_captions_never_contradict_what_the_name_says_about_the_colour(tool: Any) -> None:
    apple = ball(tool, (0.85, 0.1, 0.12), ("red apple", "apple"))
    assert tool.captions(apple, tool.Variant("repainted", paint="blue"))[0] == "a blue apple"
    green = ball(tool, (0.3, 0.8, 0.2), ("green apple",))
    rng = np.random.default_rng(0)
    assert not any(v.paint for v in tool.variants(green, frozenset(), rng))


@pytest.mark.parametrize("paint", ["red", "orange", "yellow", "green", "blue", "purple", "pink"])
def test_a_repainted_object_has_the_named_colour(tool: Any, colours: Any, paint: str) -> None:
    thing = ball(tool, (0.2, 0.6, 0.9), ("ball",))
    repainted = colours.Coat.of(thing.coat.repaint(thing.picture, colours.PAINTS[paint]))
    assert repainted.natural_colour() == paint


@pytest.mark.parametrize("background", ["white", "black", "pink"])
def test_the_edge_is_a_blend_of_object_and_background_only(tool: Any, colours: Any, background: str) -> None:
    thing = ball(tool, (0.9, 0.1, 0.1), ("ball",))
    image = np.asarray(
        tool.render(thing, tool.Variant("x", background, jitter=False), np.random.default_rng(0))
    )
    ground = np.array(colours.BACKGROUNDS[background], np.float32)
    line = np.array([0.9, 0.1, 0.1]) * 255 - ground
    along = ((image - ground) @ line) / (line @ line)
    # nothing off the line between the two colours, but for what Lanczos rings
    assert np.abs(image - ground - along[..., None] * line).max() < 8
    assert along.min() > -0.02
    assert tuple(image[0, 0]) == colours.BACKGROUNDS[background]


def test_articles(tool: Any) -> None:
    article = importlib.import_module("emoji").with_article
    phrases = (
        "cat",
        "orange guitar",
        "unicorn",
        "jeans",
        "glass of milk",
        "cactus",
        "bouquet of flowers",
        "corn",
    )
    assert [article(p) for p in phrases] == [
        "a cat", "an orange guitar", "a unicorn", "jeans", "a glass of milk", "a cactus", "a bouquet of flowers",
        "corn",
    ]  # fmt: skip


def test_the_same_seed_writes_the_same_pictures_and_held_out_pairs_are_not_shown(
    tool: Any, tmp_path: Path
) -> None:
    things = [ball(tool, (0.9, 0.1, 0.1), ("ball",)), ball(tool, (0.1, 0.2, 0.9), ("blue marble", "marble"))]
    held = tool.choose_held_out(things, 0.3, 0)
    for name in ("a", "b"):
        tool.build(things, tmp_path / name, held_out=held, seed=7)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row["background"] in held[row["object"]]]
    assert sum(map(len, held.values())) == 5
    for row in rows:
        first, second = ((tmp_path / n / row["file_name"]).read_bytes() for n in ("a", "b"))
        assert first == second
        with Image.open(tmp_path / "a" / row["file_name"]) as image:
            assert image.mode == "RGB"
            assert image.size == (row["width"], row["height"])
    assert len({(r["height"], r["width"]) for r in rows}) > 3
    assert 2.5 <= min(r["aesthetic_score"] for r in rows) < max(r["aesthetic_score"] for r in rows) == 6.0
