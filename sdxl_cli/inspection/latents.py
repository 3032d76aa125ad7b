"""``sdxl inspect-latents``, from inputs to numbers and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_vae
from sdxl_cli.console import get as console
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.preview import LatentColours, fit_colours
from sdxl_cli.inspection.audit import Audit, audit_decoder, audit_vae
from sdxl_cli.inspection.families import likeness
from sdxl_cli.inspection.findings import FITTING, Comparison, Followed, LatentReport, quality
from sdxl_cli.inspection.inputs import Item, Picture, Stored, chosen, find_inputs, require_channels
from sdxl_cli.inspection.sheets import ROWS, Sheet, Strip, channel_maps, comparison, decoded, versus
from sdxl_cli.inspection.statistics import frechet
from sdxl_cli.inspection.subject import Perceptual, Subject, agreement, cut, rank, ranked, spread
from sdxl_cli.metrics.similarity import psnr
from sdxl_cli.model.vae import Autoencoder

AUDITED = 4
"""Pictures or latents that an audit looks at: peaks differ little between pictures, and every layer is watched."""

NOTABLE = 0.01
"""dB of PSNR by which one picture has to be better than another to count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectRequest:
    """What ``sdxl inspect-latents`` was asked for."""

    inputs: tuple[Path, ...]
    """Pictures, folders, manifests, latent caches, safetensors files of latents."""
    vae: str | None = None
    """The autoencoder: a file, folder or name; None: the released one, else the bundled one."""
    compare_vae: str | None = None
    """Another autoencoder, for the same pictures."""
    compare: Path | None = None
    """Other pictures or latents, to set beside the inputs."""
    limit: int = 1000
    """Pictures or latents looked at, evenly spread over what there is; 0: all of them."""
    max_side: int = 1024
    """Picture files with a longer side are shrunk to it, in pixels; 0 leaves them. Manifests say it themselves."""
    scale_factor: float | None = None
    """Instead of the autoencoder's."""
    latents_are_scaled: bool = False
    """Latents in safetensors files were multiplied by the scale factor, as generation has them."""
    audit: bool = False
    """Whether to watch the autoencoder's layers."""
    network_channels: int | None = None
    """Of the latents that a U-Net is going to read, where one is; others are refused."""
    device: str = "cpu"
    """As torch names it."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Numbers, and pictures of them."""

    report: LatentReport
    sheets: tuple[Sheet, ...]
    sample: tuple[Tensor, ...] = ()
    """A few of the latents, scaled [1, z, h, w]."""


def inspect_latents(request: InspectRequest, lpips: Perceptual | None = None) -> Findings:
    """Measure latents and, where there are pictures, what the autoencoder makes of them.

    Args:
        request: what to look at.
        lpips: measures reconstructions as people see them.

    Raises:
        UsageError, FileError: an input or an autoencoder cannot be used.
    """
    items, found = _picked(request.inputs, request)
    if request.network_channels is not None:
        require_channels(items, request.network_channels, "the model's U-Net")
    files = None
    pictures = any(isinstance(item, Picture) for item in items)
    if request.compare_vae is not None and not pictures:
        raise UsageError("--compare-vae: needs pictures; latents were made by one autoencoder already")
    others = _picked((request.compare,), request)[0] if request.compare is not None else []
    pictures |= any(isinstance(item, Picture) for item in others)
    if request.scale_factor is None or pictures or request.vae is not None or request.audit:
        files = locate(request.vae, "vae")
        console().note(f"autoencoder: {files.describe()}")
        if request.vae is not None or request.audit:
            require_channels(items, files.config.vae.z_channels, files.name)
    return _Inspection(request, files, lpips).run(items, found, others)


def look_at(
    latents: Sequence[tuple[str, Tensor]], vae: Autoencoder, name: str, *, followed: Followed, audit: bool
) -> Findings:
    """The same for latents that were just made.

    Args:
        latents: (name, scaled [z, h, w]).
        vae: their autoencoder, in fp32.
        name: the autoencoder's.
        followed: how they were made.
        audit: whether to watch the decoder's layers.
    """
    request = InspectRequest(inputs=(), vae=name, latents_are_scaled=True, audit=audit)
    device = str(next(vae.parameters()).device)
    looking = _Inspection(replace(request, device=device), None, None, (name, vae))
    items = [Stored(label, _given(latent)) for label, latent in latents]
    found = looking.run(items, len(items), [])
    return replace(found, report=replace(found.report, followed=followed))


def _given(latent: Tensor) -> Callable[[], tuple[Tensor, Tensor | None]]:
    return lambda: (latent, None)


def _picked(paths: tuple[Path, ...], request: InspectRequest) -> tuple[list[Item], int]:
    items = find_inputs(paths, request.max_side)
    picked = chosen(items, request.limit)
    if len(picked) < len(items):
        console().note(f"{len(picked)} of {len(items)} are looked at, evenly spread; --limit 0 takes all")
    return picked, len(items)


@dataclass(slots=True)
class _Shown:
    """Pictures for the sheets, a few of each kind."""

    maps: list[Strip] = field(default_factory=list)
    decoded: list[Strip] = field(default_factory=list)
    compared: list[tuple[float, Strip]] = field(default_factory=list)
    """Reconstructions with their PSNR, the worst ones."""
    versus: list[Strip] = field(default_factory=list)

    def keep(self, quality_: float, strip: Strip) -> None:
        """Put a reconstruction among the worst, or forget it."""
        self.compared = sorted([*self.compared, (quality_, strip)], key=lambda pair: rank(pair[0]))[:ROWS]


class _Inspection:
    """Goes through the items with one autoencoder, or two."""

    def __init__(
        self,
        request: InspectRequest,
        files: ModelFiles | None,
        lpips: Perceptual | None,
        loaded: tuple[str, Autoencoder] | None = None,
    ) -> None:
        self.request, self.lpips = request, lpips
        self.name = files.name if files else loaded[0] if loaded else None
        scale = request.scale_factor
        if scale is None:
            scale = (
                files.config.vae.scale_factor if files else loaded[1].config.scale_factor if loaded else 1.0
            )
        opened = self._opener(files) if files else (lambda: loaded[1]) if loaded else None
        self.first = self._subject(self.name or "latents", scale, opened)
        self.second: Subject | None = None
        if request.compare_vae is not None:
            other = locate(request.compare_vae, "vae")
            console().note(f"compared with: {other.describe()}")
            self.second = self._subject(other.name, other.config.vae.scale_factor, self._opener(other))
        elif request.compare is not None:
            self.second = self._subject(str(request.compare), scale, opened)
        self.decodes = request.vae is not None
        """Stored latents are decoded when it was said by what."""
        self.unusable: list[str] = []
        self.shown = _Shown()
        self.audited: list[tuple[str, Tensor]] = []

    def _opener(self, files: ModelFiles) -> Callable[[], Autoencoder]:
        return lambda: load_vae(files, dtype=torch.float32, device=self.request.device)

    def _subject(self, name: str, scale: float, vae: Callable[[], Autoencoder] | None) -> Subject:
        stored = scale if self.request.latents_are_scaled else 1.0
        return Subject(name, scale, vae, device=self.request.device, lpips=self.lpips, stored_scale=stored)

    @torch.inference_mode()
    def run(self, items: Sequence[Item], found: int, others: Sequence[Item]) -> Findings:
        """Go through the items and put everything together."""
        places = spread(len(items), ROWS)
        for index, item in enumerate(console().progress(items, "inspecting", total=len(items))):
            if isinstance(item, Stored):
                self._stored(item, index, index in places)
            else:
                self._picture(item, index, index in places)
        if others:
            assert self.second is not None
            for index, item in enumerate(console().progress(others, "comparing", total=len(others))):
                self._other(self.second, item, index)
        for line in self.unusable:
            console().warn(f"left out: {line}")
        if not len(self.first):
            raise FileError(self.unusable[0] if self.unusable else "the inputs hold nothing to look at")
        if self.second is not None and not len(self.second):
            raise FileError(f"{self.second.name}: holds nothing that can be compared")
        for index in sorted(spread(len(self.first), ROWS)):
            latent = self.first.latent(index) * self.first.scale_factor
            self.shown.maps.append(channel_maps(self.first.names[index], latent))
        sample = [self.first.latent(i) for i in sorted(spread(len(self.first), AUDITED))]
        scaled = tuple(latent[None] * self.first.scale_factor for latent in sample)
        return Findings(self._report(found), tuple(self._sheets()), scaled)

    def _stored(self, item: Stored, index: int, shown: bool) -> None:
        image = self.first.see_stored(item, index, decode=self.decodes and shown)
        if image is not None:
            latent = self.first.mean_of(item.name)
            assert latent is not None
            self.shown.decoded.append(
                decoded(item.name, image, latent * self.first.scale_factor, self._preview)
            )

    def _picture(self, item: Picture, index: int, shown: bool) -> None:
        subjects = [self.first] + (
            [self.second] if self.second is not None and self.request.compare_vae else []
        )
        multiple = math.lcm(*(subject.vae.config.downsampling for subject in subjects))
        try:
            image = cut(item.load(), multiple, item.name)
        except FileError as error:
            self.unusable.append(str(error))
            return
        again = [
            subject.see_picture(item.name, image, torch.Generator("cpu").manual_seed(index))
            for subject in subjects
        ]
        if shown and len(self.audited) < AUDITED:
            self.audited.append((item.name, image))
        last = self.first.reconstructions[-1]
        label = f"{item.name}   {last.psnr:.1f} dB" + (
            f", SSIM {last.ssim:.3f}" if last.ssim is not None else ""
        )
        self.shown.keep(last.psnr, comparison(label, image, again[0]))
        if len(again) > 1 and shown:
            gains = [float(psnr(image[None], other[None])) for other in again]
            self.shown.versus.append(
                versus(f"{item.name}   {gains[0]:.1f} and {gains[1]:.1f} dB", image, again)
            )

    def _other(self, subject: Subject, item: Item, index: int) -> None:
        if isinstance(item, Stored):
            subject.see_stored(item, index)
            return
        try:
            image = cut(item.load(), subject.vae.config.downsampling, item.name)
        except FileError as error:
            self.unusable.append(str(error))
            return
        subject.see_picture(item.name, image, torch.Generator("cpu").manual_seed(index))

    @cached_property
    def _preview(self) -> LatentColours:
        return fit_colours(self.first.vae)

    def _report(self, found: int) -> LatentReport:
        first = self.first
        measured = first.statistics()
        together = measured.together
        family = likeness(measured)
        scaled = together.std * first.scale_factor
        looks_scaled = family.scaled is True or FITTING[0] <= together.std <= FITTING[1]
        if first.raw_files and looks_scaled:
            console().note(
                "these look as if they were multiplied by the scale factor already; then add --scaled"
            )
        colours = None
        if first.colours is not None and first.colours.positions:
            colours = first.colours.report(self._preview if first.loaded else None)
        return LatentReport(
            vae=self.name,
            found=found,
            inspected=len(first),
            unusable=tuple(self.unusable),
            channels=measured.channels,
            together=together,
            correlation=measured.correlation,
            posterior_std=first.posterior_std(),
            scale_factor=first.scale_factor,
            scaled_std=scaled,
            measured_scale_factor=1 / together.std if together.std else math.inf,
            scale_fits=FITTING[0] <= scaled <= FITTING[1],
            family=family,
            colours=colours,
            reconstructions=tuple(ranked(first.reconstructions)),
            quality=quality(first.reconstructions),
            not_finite=(*first.not_finite, *(self.second.not_finite if self.second is not None else ())),
            comparison=self._comparison(),
            audits=self._audits(),
        )

    def _comparison(self) -> Comparison | None:
        other = self.second
        if other is None:
            return None
        ours, theirs = self.first.statistics(), other.statistics()
        paired = agreement(self.first, other)
        before = {r.name: r.psnr for r in self.first.reconstructions}
        gains = [r.psnr - before[r.name] for r in other.reconstructions if r.name in before]
        same = len(ours.channels) == len(theirs.channels)
        return Comparison(
            name=other.name,
            inspected=len(other),
            channels=theirs.channels,
            together=theirs.together,
            scale_factor=other.scale_factor,
            scaled_std=theirs.together.std * other.scale_factor,
            frechet=frechet(ours, theirs) if same else None,
            pairs=paired.pairs,
            rms_difference=paired.rms,
            channel_correlation=paired.correlation,
            reconstructions=tuple(ranked(other.reconstructions)),
            quality=quality(other.reconstructions),
            better=sum(gain >= NOTABLE for gain in gains),
            worse=sum(gain <= -NOTABLE for gain in gains),
        )

    def _audits(self) -> tuple[Audit, ...]:
        if not self.request.audit:
            return ()
        if self.audited:
            return (audit_vae(self.first.vae, self.audited),)
        places = sorted(spread(len(self.first), AUDITED))
        latents = [(self.first.names[i], self.first.latent(i)) for i in places]
        return (audit_decoder(self.first.vae, latents),)

    def _sheets(self) -> list[Sheet]:
        shown = self.shown
        named = {
            "reconstructions": [strip for _, strip in shown.compared],
            "versus": shown.versus,
            "decoded": shown.decoded,
            "channels": shown.maps,
        }
        second = self.second.name if self.second is not None else ""
        return [Sheet.of(kind, strips, self.first.name, second) for kind, strips in named.items() if strips]
