"""The ten colours the bundled model knows by name, and how an object is given another one.

The same table paints the backgrounds of the training pictures and judges what the trained model paints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "red": (220, 36, 44),
    "orange": (247, 140, 30),
    "yellow": (252, 216, 52),
    "green": (52, 168, 72),
    "light blue": (140, 206, 250),
    "blue": (38, 82, 220),
    "purple": (130, 54, 184),
    "pink": (252, 152, 194),
}
"""sRGB of each named background."""


@dataclass(frozen=True, slots=True)
class Paint:
    """An object's colour: hue in degrees, and the median HSV saturation and value, 0..1, of its coloured parts."""

    hue: float
    saturation: float
    value: float


PAINTS: dict[str, Paint] = {
    "red": Paint(356.0, 0.86, 0.88),
    "orange": Paint(27.0, 0.90, 0.97),
    "yellow": Paint(50.0, 0.84, 0.99),
    "green": Paint(132.0, 0.74, 0.70),
    "blue": Paint(222.0, 0.80, 0.92),
    "purple": Paint(276.0, 0.66, 0.78),
    "pink": Paint(334.0, 0.46, 0.99),
}
"""Colours that an object can be repainted in."""

HUES: dict[str, tuple[float, float]] = {
    "red": (338.0, 16.0),
    "orange": (16.0, 41.0),
    "yellow": (41.0, 66.0),
    "green": (66.0, 172.0),
    "blue": (186.0, 252.0),
    "purple": (252.0, 300.0),
    "pink": (300.0, 338.0),
}
"""Degrees of hue, from and to, behind each name."""


def nearest_background(rgb: tuple[float, float, float]) -> str:
    """The name whose sRGB (0..255) is nearest by Euclidean distance."""
    return min(
        BACKGROUNDS, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, BACKGROUNDS[name], strict=True))
    )


def to_hsv(rgb: Array) -> tuple[Array, Array, Array]:
    """Hue (degrees), saturation and value (0..1) of ``rgb [..., 3]`` in 0..1."""
    value = rgb.max(-1)
    chroma = value - rgb.min(-1)
    safe = np.where(chroma > 1e-6, chroma, 1.0)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(
        value == r, (g - b) / safe % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    hue = np.where(chroma > 1e-6, sector * 60.0, 0.0)
    return hue.astype(np.float32), (chroma / np.maximum(value, 1e-6)).astype(np.float32), value


def from_hsv(hue: Array, saturation: Array, value: Array) -> Array:
    """The inverse of :func:`to_hsv`; the result is ``[..., 3]`` in 0..1."""
    offsets = np.array([5.0, 3.0, 1.0], np.float32)
    k = (offsets + hue[..., None] / 60.0) % 6
    dip = np.clip(np.minimum(k, 4 - k), 0, 1)
    return np.asarray(value[..., None] * (1 - saturation[..., None] * dip), np.float32)


@dataclass(frozen=True, slots=True)
class Coat:
    """The coloured parts of an object: what is neither white, grey, black nor shine.

    All arrays are ``[n]``, one entry per pixel that shows at all; ``visible [h, w]`` says which those are.
    """

    visible: NDArray[np.bool_]
    rgb: Array
    hue: Array
    saturation: Array
    value: Array
    mix: Array
    """How much a pixel is paint, 0..1."""
    weight: Array
    """``mix`` times alpha."""
    share: float
    """Share of the object's area that is paint, 0..1."""
    median: tuple[float, float, float]
    """Of hue (degrees), saturation and value, over the paint; zeros when there is none."""

    @classmethod
    def of(cls, rgba: Array) -> Coat:
        """Look at a straight-alpha picture ``[h, w, 4]`` in 0..1."""
        visible = rgba[..., 3] > 0
        rgb, alpha = rgba[visible, :3], rgba[visible, 3]
        hue, saturation, value = to_hsv(rgb)
        mix = _smoothstep(saturation, 0.16, 0.38) * _smoothstep(value, 0.06, 0.20)
        weight = mix * alpha
        # Hues are averaged around their circle, starting opposite the mean, so that red is not torn at 0.
        turn = float(np.angle(np.sum(weight * np.exp(1j * np.deg2rad(hue))), deg=True)) + 180
        middle = (_median((hue - turn) % 360, weight) + turn) % 360
        share = float(weight.sum() / max(float(alpha.sum()), 1.0))
        median = (middle, _median(saturation, weight), _median(value, weight))
        return cls(visible, rgb, hue, saturation, value, mix, weight, share, median)

    def natural_colour(self) -> str | None:
        """The one colour name a person would give the object, or None when it has several, or none, or is beige."""
        total = float(self.weight.sum())
        if self.share < 0.5 or total < 1:
            return None
        _, saturation, value = self.median
        for name, (start, end) in HUES.items():
            inside = (self.hue >= start) & (self.hue <= end)
            if start > end:
                inside = (self.hue >= start) | (self.hue <= end)
            if float((self.weight * inside).sum()) >= 0.7 * total:
                return _by_light(name, saturation, value)
        return None

    def repaint(self, rgba: Array, paint: Paint) -> Array:
        """The picture this coat was taken from, with its coloured parts in another colour.

        Light and dark, white and black stay where they are; small differences of hue inside the object are kept.
        """
        hue, saturation, value = self.median
        deviation = np.clip(((self.hue - hue + 180) % 360 - 180) * 0.4, -6, 6)
        painted = from_hsv(
            ((paint.hue + deviation) % 360).astype(np.float32),
            _towards(self.saturation, saturation, paint.saturation),
            _towards(self.value, value, paint.value),
        )
        mix = self.mix[:, None]
        result = rgba.copy()
        result[self.visible, :3] = self.rgb * (1 - mix) + painted * mix
        return result


def _by_light(name: str, saturation: float, value: float) -> str | None:
    """A hue's name once it is known how pale and how dark it is: dark orange is brown, pale red is pink."""
    if name == "orange":
        return "brown" if value < 0.72 else ("orange" if saturation > 0.72 and value > 0.85 else None)
    if name == "red":
        if saturation > 0.72:
            return "red" if value > 0.62 else None
        return "brown" if value < 0.62 else ("pink" if saturation < 0.6 and value > 0.93 else None)
    if name == "yellow":
        return "yellow" if value > 0.8 and saturation > 0.5 else None
    if name == "purple":
        return name if saturation > 0.4 and value > 0.6 else None
    return name if saturation > 0.4 and value > 0.35 else None


def _towards(x: Array, median: float, target: float) -> Array:
    """``x`` (0..1) with its median moved: darkened in proportion, or brightened by a gamma that keeps 0 and 1."""
    if target <= median:
        return np.asarray(x * (target / median), np.float32)
    low = min(max(median, 0.02), 0.98)
    return np.asarray(x ** max(float(np.log(target) / np.log(low)), 0.3), np.float32)


def _median(x: Array, weight: Array) -> float:
    """Weighted, over every fourth value; 0 when nothing has weight."""
    x, weight = x[::4], weight[::4]
    cumulative = np.cumsum(weight[order := np.argsort(x)])
    if not len(x) or cumulative[-1] <= 0:
        return 0.0
    return float(x[order[np.searchsorted(cumulative, cumulative[-1] / 2)]])


def _smoothstep(x: Array, low: float, high: float) -> Array:
    t = np.clip((x - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)
