"""``sdxl inspect-latents``, from inputs to numbers and sheets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_vae
from sdxl_cli.console import get as console
from sdxl_cli.console import to_jsonable
from sdxl_cli.errors import FileError
from sdxl_cli.inspection.inputs import Item, Picture, Stored, chosen, find_inputs
from sdxl_cli.inspection.sheets import AMPLIFIED, Strip, channel_maps, comparison, save_png, sheet
from sdxl_cli.inspection.statistics import Statistics, correlation, statistics
from sdxl_cli.metrics.similarity import psnr
from sdxl_cli.model.vae import Autoencoder, Moments

ROWS = 12
"""Strips on a sheet."""
FITTING = (0.8, 1.25)
"""What the deviation of scaled latents may be for the scale factor to fit."""
RECONSTRUCTIONS, CHANNELS, REPORT = "reconstructions.png", "channels.png", "report.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectRequest:
    """What ``sdxl inspect-latents`` was asked for."""

    inputs: tuple[Path, ...]
    """Pictures, folders, manifests, latent caches, safetensors files of latents."""
    vae: str | None = None
    """The autoencoder: a file, folder or name; None: the released one, else the bundled one."""
    output: Path | None = None
    """Folder for the sheets and the report."""
    limit: int = 1000
    """Pictures or latents looked at, evenly spread over what there is; 0: all of them."""
    max_side: int = 1024
    """Picture files with a longer side are shrunk to it, in pixels; 0 leaves them. Manifests say it themselves."""
    scale_factor: float | None = None
    """Instead of the autoencoder's."""
    latents_are_scaled: bool = False
    """Latents in safetensors files were multiplied by the scale factor, as generation has them."""
    device: str = "cpu"
    """As torch names it."""


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """How well a picture survives encoding (the mean of its posterior) and decoding."""

    name: str
    psnr: float
    """In dB."""


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
    reconstructions: tuple[Reconstruction, ...]
    """The worst first."""
    mean_psnr: float | None
    not_finite: tuple[str, ...]
    """Which latents and reconstructions have NaN or infinite values."""
    files: tuple[Path, ...]
    """Sheets that were written."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A latent [z, h, w], unscaled, float32."""

    name: str
    values: Tensor
    variance: Tensor | None
    """Of the posterior [z, h, w]."""


def inspect_latents(request: InspectRequest) -> LatentReport:
    """Measure latents and, where there are pictures, what the autoencoder makes of them.

    Raises:
        UsageError, FileError: an input or the autoencoder cannot be used, or ``output`` has a report already.
    """
    _require_room(request.output)
    items = find_inputs(request.inputs, request.max_side)
    picked = chosen(items, request.limit)
    if len(picked) < len(items):
        console().note(f"{len(picked)} of {len(items)} are looked at, evenly spread; --limit 0 takes all")
    files = None
    if request.scale_factor is None or any(isinstance(item, Picture) for item in picked):
        files = locate(request.vae, "vae")
        console().note(f"autoencoder: {files.describe()}")
    return _Inspection(request, files).run(picked, len(items))


class _Inspection:
    """Collects while it goes through the items."""

    def __init__(self, request: InspectRequest, files: ModelFiles | None) -> None:
        self.request, self.files = request, files
        scale = request.scale_factor
        if scale is None:
            assert files is not None
            scale = files.config.vae.scale_factor
        self.scale_factor = scale
        self.latents: list[_Found] = []
        self.reconstructions: list[Reconstruction] = []
        self.comparisons: list[tuple[float, Strip]] = []
        self.unusable: list[str] = []
        self.not_finite: list[str] = []
        self.unscaled_by_guess = False
        """Whether some latents are taken as unscaled because nobody said otherwise."""
        self._vae: Autoencoder | None = None

    @property
    def vae(self) -> Autoencoder:
        """The autoencoder in fp32, loaded when it is first needed."""
        if self._vae is None:
            assert self.files is not None
            self._vae = load_vae(self.files, dtype=torch.float32, device=self.request.device)
        return self._vae

    @torch.inference_mode()
    def run(self, items: Sequence[Item], found: int) -> LatentReport:
        """Go through the items and put everything together."""
        for index, item in enumerate(console().progress(items, "inspecting", total=len(items))):
            noise = torch.Generator("cpu").manual_seed(index)
            if isinstance(item, Stored):
                self._add(self._stored(item, noise))
            else:
                self._picture(item, noise)
        for line in self.unusable:
            console().warn(f"left out: {line}")
        if not self.latents:
            raise FileError(self.unusable[0] if self.unusable else "the inputs hold nothing to look at")
        return self._report(found)

    def _add(self, latent: _Found) -> None:
        if self.latents and len(latent.values) != len(self.latents[0].values):
            raise FileError(
                f"{latent.name} has {len(latent.values)} channels, {self.latents[0].name} has "
                f"{len(self.latents[0].values)}; inspect them one after the other"
            )
        self.latents.append(latent)
        if not bool(torch.isfinite(latent.values).all()):
            self.not_finite.append(latent.name)

    def _stored(self, item: Stored, generator: torch.Generator) -> _Found:
        mean, logvar = item.load()
        values = mean.float()
        if logvar is not None:
            return _sampled(item.name, Moments(values[None], logvar.float()[None]), generator)
        if self.request.latents_are_scaled:
            return _Found(item.name, values / self.scale_factor, None)
        self.unscaled_by_guess = True
        return _Found(item.name, values, None)

    def _picture(self, item: Picture, generator: torch.Generator) -> None:
        try:
            image = _cut(item.load(), self.vae.config.downsampling, item.name)
        except FileError as error:
            self.unusable.append(str(error))
            return
        moments = self.vae.encode(image[None].to(self.request.device))
        self._add(_sampled(item.name, moments, generator))
        again = self.vae.decode(moments.mode())[0].cpu()
        if not bool(torch.isfinite(again).all()):
            self.not_finite.append(f"{item.name} (decoded)")
        quality = float(psnr(image[None], again[None]))
        self.reconstructions.append(Reconstruction(item.name, quality))
        if self.request.output is not None:
            strip = comparison(f"{item.name}   {quality:.1f} dB", image, again)
            ranked = sorted([*self.comparisons, (_rank(quality), strip)], key=lambda pair: pair[0])
            self.comparisons = ranked[:ROWS]

    def _report(self, found: int) -> LatentReport:
        values = [latent.values for latent in self.latents]
        together = statistics(values)
        ordered = sorted(self.reconstructions, key=lambda r: _rank(r.psnr))
        scaled = together.std * self.scale_factor
        if self.unscaled_by_guess and FITTING[0] <= together.std <= FITTING[1]:
            console().note(
                "these look as if they were multiplied by the scale factor already; then add --scaled"
            )
        report = LatentReport(
            vae=self.files.name if self.files else None,
            found=found,
            inspected=len(self.latents),
            unusable=tuple(self.unusable),
            channels=tuple(statistics([v[channel] for v in values]) for channel in range(len(values[0]))),
            together=together,
            correlation=tuple(map(tuple, correlation(values))),
            posterior_std=self._posterior_std(),
            scale_factor=self.scale_factor,
            scaled_std=scaled,
            measured_scale_factor=1 / together.std if together.std else math.inf,
            scale_fits=FITTING[0] <= scaled <= FITTING[1],
            reconstructions=tuple(ordered),
            mean_psnr=sum(r.psnr for r in ordered) / len(ordered) if ordered else None,
            not_finite=tuple(self.not_finite),
            files=tuple(self._write()),
        )
        if self.request.output is not None:
            _write_report(self.request, report)
        return report

    def _posterior_std(self) -> tuple[float, ...] | None:
        variances = [latent.variance for latent in self.latents if latent.variance is not None]
        if not variances:
            return None
        means = [statistics([v[channel] for v in variances]).mean for channel in range(len(variances[0]))]
        return tuple(math.sqrt(mean) for mean in means)

    def _write(self) -> Iterator[Path]:
        if self.request.output is None:
            return
        if self.comparisons:
            titles = ("original", "reconstruction", f"difference x {AMPLIFIED}")
            path = self.request.output / RECONSTRUCTIONS
            save_png(path, sheet(titles, [strip for _, strip in self.comparisons]))
            yield path
        shown = self.latents[:: max(1, -(-len(self.latents) // ROWS))]
        strips = [channel_maps(latent.name, latent.values * self.scale_factor) for latent in shown]
        path = self.request.output / CHANNELS
        save_png(path, sheet([f"channel {index}" for index in range(len(strips[0].cells))], strips))
        yield path


def _sampled(name: str, moments: Moments, generator: torch.Generator) -> _Found:
    """A sample of the posterior, which is what a U-Net is trained on."""
    mean, logvar = moments.mean.cpu(), moments.logvar.cpu()
    sample = Moments(mean, logvar).sample(torch.randn(mean.shape, generator=generator))
    return _Found(name, sample[0], logvar[0].exp())


def _cut(image: Tensor, multiple: int, name: str) -> Tensor:
    """The middle of an image [3, H, W], its sides multiples of ``multiple`` pixels."""
    height, width = (side - side % multiple for side in image.shape[1:])
    if not height or not width:
        raise FileError(f"{name}: is smaller than {multiple} pixels on a side")
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width].contiguous()


def _rank(quality: float) -> float:
    """For sorting: what is not a number is the worst of all."""
    return -math.inf if math.isnan(quality) else quality


def _require_room(output: Path | None) -> None:
    """Refuse to overwrite, before any work is done."""
    if output is None:
        return
    if taken := [name for name in (RECONSTRUCTIONS, CHANNELS, REPORT) if (output / name).exists()]:
        raise FileError(f"{output / taken[0]} exists already; give another --output folder")


def _write_report(request: InspectRequest, report: LatentReport) -> None:
    assert request.output is not None
    asked: dict[str, Any] = {
        "inputs": request.inputs,
        "limit": request.limit,
        "max_side": request.max_side,
        "latents_are_scaled": request.latents_are_scaled,
    }
    text = json.dumps(to_jsonable({"request": asked, "report": report}), indent=2, ensure_ascii=False)
    with atomic_write(request.output / REPORT, overwrite=False) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
