"""What ``sdxl inspect-latents`` finds out, as values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl_cli.inspection.audit import Audit
from sdxl_cli.inspection.colours import ColourReport
from sdxl_cli.inspection.families import Likeness
from sdxl_cli.inspection.statistics import Statistics

FITTING = (0.8, 1.25)
"""What the deviation of scaled latents may be for the scale factor to fit."""


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """How well a picture survives encoding (the mean of its posterior) and decoding."""

    name: str
    psnr: float
    """In dB."""
    ssim: float | None
    """None where the picture is smaller than SSIM's window."""
    lpips: float | None = None
    """None where it was not asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Of many reconstructions: the mean of each number over the pictures that have it."""

    psnr: float | None
    ssim: float | None
    lpips: float | None


def quality(reconstructions: Sequence[Reconstruction]) -> Quality:
    """The means."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return (
            math.fsum(known) / len(known)
            if known and all(map(math.isfinite, known))
            else (math.nan if known and any(map(math.isnan, known)) else (math.inf if known else None))
        )

    return Quality(
        psnr=mean([r.psnr for r in reconstructions]),
        ssim=mean([r.ssim for r in reconstructions]),
        lpips=mean([r.lpips for r in reconstructions]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The same pictures through another autoencoder, or other latents, beside the first ones."""

    name: str
    inspected: int
    channels: tuple[Statistics, ...]
    together: Statistics
    scale_factor: float
    scaled_std: float
    frechet: float | None
    """Squared Fréchet distance of the Gaussians of both, unscaled; None where the channels are not as many."""
    pairs: int
    """Latents that both have, by name."""
    rms_difference: float | None
    """Of the means of paired latents, unscaled; None without pairs of one size."""
    channel_correlation: tuple[float, ...] | None
    """Of paired latents, channel by channel, -1 … 1."""
    reconstructions: tuple[Reconstruction, ...]
    quality: Quality
    better: int
    """Pictures that come back with a PSNR higher by 0.01 dB or more than through the first autoencoder."""
    worse: int
    """Pictures for which it is the other way round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """Of one latent; values that are not finite are left out."""

    mean: float
    std: float
    minimum: float
    maximum: float
    non_finite: int
    channel_means: tuple[float, ...]
    channel_stds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowedStep:
    """A step of a generation; latents are scaled, as the U-Net has them."""

    step: int
    """From 1."""
    who: str
    """``base`` or ``refiner``."""
    timestep: int
    sigma: float
    expected_std: float
    """sqrt(sigma² + 1): what x has where the clean latent's deviation is 1."""
    x: Values
    denoised: Values
    eps: Values
    """(x - denoised) / sigma."""
    change: float | None
    """Root mean square of what denoised changed since the step before; None at the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Followed:
    """A generation, step by step."""

    prompt: str
    seed: int
    size: str
    """WxH."""
    plan: str
    """Who does which steps."""
    sampler: str
    guidance: str
    steps: tuple[FollowedStep, ...]
    stopped: str | None
    """Why it ended early; None when it did not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentReport:
    """What was found. Statistics are of unscaled latents: posterior samples where there is a posterior."""

    vae: str | None
    """Which autoencoder; None where none was needed."""
    found: int
    """Pictures and latents that the inputs hold."""
    inspected: int
    unusable: tuple[str, ...]
    """Pictures that could not be read, and why."""
    channels: tuple[Statistics, ...]
    together: Statistics
    """All channels."""
    correlation: tuple[tuple[float, ...], ...]
    """Of every two channels, -1 … 1."""
    posterior_std: tuple[float, ...] | None
    """Root mean square of the posteriors' deviations, per channel."""
    scale_factor: float
    scaled_std: float
    """Deviation of all latents times the scale factor: 1 is what the U-Net expects."""
    measured_scale_factor: float
    """1 / deviation."""
    scale_fits: bool
    family: Likeness
    colours: ColourReport | None
    """None where no latent was seen beside its picture."""
    reconstructions: tuple[Reconstruction, ...]
    """The worst first."""
    quality: Quality
    not_finite: tuple[str, ...]
    """Which latents and reconstructions have NaN or infinite values."""
    followed: Followed | None = None
    comparison: Comparison | None = None
    audits: tuple[Audit, ...] = ()
    files: tuple[Path, ...] = ()
    """Sheets and reports that were written."""
