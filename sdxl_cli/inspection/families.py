"""Whose latents are these: what is published about the two four-channel autoencoders that people mix up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdxl_cli.inspection.statistics import LatentStatistics

NEAR = 0.65
"""A family further away than this is none; the two published ones are 1.3 apart."""
CLEARLY = 0.5
"""The nearest family has to be this many times as far away as the next, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Published numbers about an autoencoder's unscaled latents, channel by channel."""

    name: str
    scale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    colours: tuple[tuple[float, float, float], ...]
    """Of scaled latents, red, green and blue per channel: ComfyUI's preview factors (comfy/latent_formats.py)."""


FAMILIES = (
    Family(
        name="SD 1.x/2.x",
        scale_factor=0.18215,
        mean=(5.81, 3.25, 0.12, -2.15),
        std=(4.17, 4.62, 3.71, 3.28),
        source="EDM2 (arXiv 2312.02696, training/encoders.py): ImageNet at 512 pixels",
        colours=(
            (0.3512, 0.2297, 0.3227),
            (0.3250, 0.4974, 0.2350),
            (-0.2829, 0.1762, 0.2721),
            (-0.2120, -0.2616, -0.7177),
        ),
    ),
    Family(
        name="SDXL",
        scale_factor=0.13025,
        mean=(-1.6574, 1.886, -1.383, 2.5155),
        std=(8.4927, 5.9022, 6.5498, 5.2299),
        source="Playground v2.5 (vae/config.json, latents_mean and latents_std), which uses SDXL's",
        colours=(
            (0.3651, 0.4232, 0.4341),
            (-0.2533, -0.0042, 0.1068),
            (0.1076, 0.1111, -0.0362),
            (-0.3165, -0.2492, -0.2188),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What the latents could be."""

    family: str
    scaled: bool
    """Whether they were multiplied by the family's scale factor."""
    distance: float
    """See :func:`distance`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """What the statistics look like."""

    family: str | None
    """None: one cannot tell."""
    scaled: bool | None
    says: str
    """The verdict in a sentence."""
    candidates: tuple[Candidate, ...]
    """The nearest first."""
    plain: float
    """How far the latents are from channels that are all alike, with mean 0: a family has to explain more."""


def distance(
    mean: Sequence[float], std: Sequence[float], ref_mean: Sequence[float], ref_std: Sequence[float]
) -> float:
    """How far apart channels are: means in the reference's deviations and logarithms of ratios of deviations, in the
    root of the mean square.
    """
    terms = [
        ((m - rm) / rs) ** 2 + math.log(max(s, 1e-30) / rs) ** 2
        for m, s, rm, rs in zip(mean, std, ref_mean, ref_std, strict=True)
    ]
    return math.sqrt(sum(terms) / len(terms))


def likeness(found: LatentStatistics) -> Likeness:
    """Which family latents look like, scaled or not.

    Pictures of one kind can have other statistics than those that the published numbers come from. So a verdict is
    given only where one family is near, the other clearly further, and the numbers say more than that the channels
    are centred and alike, which noise and many other autoencoders are too.
    """
    mean, std = [c.mean for c in found.channels], [c.std for c in found.channels]
    if len(mean) != len(FAMILIES[0].mean):
        return _unknown(
            (), math.nan, f"neither SD nor SDXL: their latents have 4 channels, these {len(mean)}"
        )
    if not all(map(math.isfinite, (*mean, *std))):
        return _unknown((), math.nan, "cannot be told: a channel has no finite values")
    candidates = sorted(
        (
            Candidate(
                family=family.name,
                scaled=scale != 1,
                distance=distance(
                    mean, std, *([v * scale for v in ref] for ref in (family.mean, family.std))
                ),
            )
            for family in FAMILIES
            for scale in (1.0, family.scale_factor)
        ),
        key=lambda candidate: candidate.distance,
    )
    best = candidates[0]
    rival = next(c for c in candidates if c.family != best.family)
    power = math.sqrt(sum(m**2 + s**2 for m, s in zip(mean, std, strict=True)) / len(mean))
    plain = distance(mean, std, [0.0] * len(mean), [power] * len(mean)) if power else math.inf
    near = f"nearest is {best.family} at {best.distance:.2f}, then {rival.family} at {rival.distance:.2f}"
    if best.distance > NEAR:
        return _unknown(candidates, plain, f"neither SD nor SDXL as far as one can tell ({near})")
    if best.distance > CLEARLY * rival.distance or best.distance >= plain:
        return _unknown(candidates, plain, f"cannot be told from these ({near}; plain noise {plain:.2f})")
    how = "times its scale factor" if best.scaled else "unscaled"
    return Likeness(
        family=best.family,
        scaled=best.scaled,
        says=f"{best.family}, {how} ({near})",
        candidates=tuple(candidates),
        plain=plain,
    )


def _unknown(candidates: Sequence[Candidate], plain: float, says: str) -> Likeness:
    return Likeness(family=None, scaled=None, says=says, candidates=tuple(candidates), plain=plain)


def colour_likeness(weight: Sequence[Sequence[float]]) -> dict[str, float]:
    """Family -> cosine of the angle between its published latent colours and these [4][3]; empty for other shapes."""
    found = {}
    for family in FAMILIES:
        if len(weight) != len(family.colours):
            continue
        pairs = [
            (a, b)
            for ours, theirs in zip(weight, family.colours, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        lengths = math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))
        found[family.name] = sum(a * b for a, b in pairs) / lengths if lengths else math.nan
    return found
