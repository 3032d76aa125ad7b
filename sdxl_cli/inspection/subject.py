"""One autoencoder, or one heap of latents, under the lamp: collects while pictures and latents go by."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdxl_cli.errors import FileError
from sdxl_cli.inspection.colours import ColourFit
from sdxl_cli.inspection.findings import Reconstruction
from sdxl_cli.inspection.inputs import Stored
from sdxl_cli.inspection.statistics import LatentStatistics, measure
from sdxl_cli.metrics.similarity import WINDOW, psnr, ssim
from sdxl_cli.model.vae import Autoencoder, Moments

_IN_MEMORY = 256 << 20
"""Bytes of latents of pictures that are kept in memory; more are put into a file."""

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Pictures [B, 3, H, W] and others to their distances [B]: LPIPS."""


class Spool:
    """Latents that were expensive, kept for going through them again: in memory, or in a file when they are many."""

    def __init__(self, in_memory: int = _IN_MEMORY) -> None:
        # closed, and so removed, when nobody has it any more
        self._file = tempfile.SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115
        self._end = 0

    def put(self, latent: Tensor) -> Callable[[], Tensor]:
        """Keep a latent; returns what reads it back, as float32."""
        values = np.ascontiguousarray(latent.float().cpu().numpy())
        start, shape, count = self._end, tuple(latent.shape), values.nbytes
        self._file.seek(start)
        self._file.write(values.tobytes())
        self._end += count

        def read() -> Tensor:
            self._file.seek(start)
            return torch.from_numpy(np.frombuffer(self._file.read(count), np.float32).reshape(shape).copy())

        return read


class Subject:
    """Collects what goes by, in the order it does."""

    def __init__(
        self,
        name: str,
        scale_factor: float,
        vae: Callable[[], Autoencoder] | None = None,
        *,
        device: str = "cpu",
        lpips: Perceptual | None = None,
        stored_scale: float = 1.0,
    ) -> None:
        """``vae`` loads the autoencoder, in fp32; ``stored_scale`` is what stored latents were multiplied by."""
        self.name, self.scale_factor = name, scale_factor
        self.reconstructions: list[Reconstruction] = []
        self.not_finite: list[str] = []
        self.colours: ColourFit | None = None
        self.raw_files = False
        """Whether there were latents of a file that does not say whether they are scaled."""
        self._open, self._device, self._lpips, self._stored_scale = vae, device, lpips, stored_scale
        self._vae: Autoencoder | None = None
        self._spool = Spool()
        self._latents: list[tuple[str, Callable[[], Tensor]]] = []
        self._means: dict[str, Callable[[], Tensor]] = {}
        self._channels = 0
        self._variances: Tensor | None = None
        self._variance_count = 0

    @property
    def vae(self) -> Autoencoder:
        """The autoencoder, loaded when it is first needed."""
        if self._vae is None:
            assert self._open is not None
            self._vae = self._open()
        return self._vae

    @property
    def loaded(self) -> bool:
        """Whether the autoencoder was needed."""
        return self._vae is not None

    def __len__(self) -> int:
        return len(self._latents)

    @property
    def names(self) -> list[str]:
        """Of the latents."""
        return [name for name, _ in self._latents]

    def latent(self, index: int) -> Tensor:
        """The latent of that place, unscaled [z, h, w]."""
        return self._latents[index][1]()

    def mean_of(self, name: str) -> Tensor | None:
        """The mean of a latent's posterior, or the latent itself, unscaled; None when there is none of that name."""
        read = self._means.get(name)
        return None if read is None else read()

    def see_picture(self, name: str, image: Tensor, noise: torch.Generator) -> Tensor:
        """Encode and decode a picture [3, H, W]; returns what came back, on the CPU."""
        moments = self.vae.encode(image[None].to(self._device))
        mean, logvar = moments.mean.cpu(), moments.logvar.cpu()
        again = self.vae.decode(moments.mode())[0].cpu()
        self._see(
            name, self._spool.put(_sample(mean[0], logvar[0], noise)), logvar[0], self._spool.put(mean[0])
        )
        self._colour(mean[0], image)
        if not bool(torch.isfinite(again).all()):
            self.not_finite.append(f"{name} (decoded)")
        pair = image[None], again[None]
        small = min(image.shape[1:]) < WINDOW
        self.reconstructions.append(
            Reconstruction(
                name,
                float(psnr(*pair)),
                None if small else float(ssim(*pair)),
                self._distance(*(part.clamp(-1, 1) for part in pair)),
            )
        )
        return again

    def _distance(self, image: Tensor, other: Tensor) -> float | None:
        """LPIPS; None where nobody asked, or the picture is too small for its network."""
        if self._lpips is None:
            return None
        try:
            return float(self._lpips(image, other))
        except ValueError:
            return None

    def see_stored(self, item: Stored, seed: int, *, decode: bool = False) -> Tensor | None:
        """Look at a stored latent; with ``decode`` returns its picture, on the CPU [3, H, W]."""

        def both() -> tuple[Tensor, Tensor | None]:
            mean, logvar = item.load()
            if logvar is not None:
                return mean.float(), logvar.float()
            return mean.float() / self._stored_scale, None

        def read() -> Tensor:
            mean, logvar = both()
            return mean if logvar is None else _sample(mean, logvar, torch.Generator("cpu").manual_seed(seed))

        mean, logvar = both()
        self.raw_files |= logvar is None and self._stored_scale == 1.0
        self._see(item.name, read, logvar, lambda: both()[0])
        if not decode:
            return None
        image: Tensor = self.vae.decode(mean[None].to(self._device))[0].cpu()
        if not bool(torch.isfinite(image).all()):
            self.not_finite.append(f"{item.name} (decoded)")
        else:
            self._colour(mean, image.clamp(-1, 1))
        return image

    def statistics(self) -> LatentStatistics:
        """Of all latents."""
        return measure(lambda: (read() for _, read in self._latents))

    def posterior_std(self) -> tuple[float, ...] | None:
        """Root mean square of the posteriors' deviations, per channel; None where there are none."""
        if self._variances is None:
            return None
        return tuple((self._variances / self._variance_count).sqrt().tolist())

    def _see(
        self, name: str, read: Callable[[], Tensor], logvar: Tensor | None, mean: Callable[[], Tensor]
    ) -> None:
        latent = read()
        if self._channels and len(latent) != self._channels:
            raise FileError(
                f"{name} has {len(latent)} channels, {self._latents[0][0]} has {self._channels}; "
                "inspect them one after the other"
            )
        self._channels = len(latent)
        self._latents.append((name, read))
        self._means[name] = mean
        if not bool(torch.isfinite(latent).all()):
            self.not_finite.append(name)
        if logvar is not None:
            # of the finite ones, as everywhere
            sums = torch.nan_to_num(logvar.double().exp(), nan=0.0, posinf=0.0).flatten(1).sum(dim=1)
            self._variances = sums if self._variances is None else self._variances + sums
            self._variance_count += logvar[0].numel()

    def _colour(self, mean: Tensor, image: Tensor) -> None:
        self.colours = self.colours or ColourFit(len(mean))
        self.colours.add(mean * self.scale_factor, image)


class Agreement:
    """How alike two heaps of latents are where they have the same names."""

    def __init__(self) -> None:
        self.pairs = self.compared = 0
        self._first: list[Tensor] = []
        self._sums: Tensor | None = None

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """A pair of latents [z, h, w]; those of different sizes count as a pair and are not compared."""
        self.pairs += 1
        if ours.shape != theirs.shape:
            return
        a, b = ours.double().flatten(1), theirs.double().flatten(1)
        whole = torch.isfinite(a).all(dim=0) & torch.isfinite(b).all(dim=0)
        a, b = a[:, whole], b[:, whole]
        parts = (a, b, a * a, b * b, a * b, (a - b).square())
        sums = torch.stack([part.sum(dim=1) for part in parts])
        self._sums = sums if self._sums is None else self._sums + sums
        self.compared += a.shape[1]

    @property
    def rms(self) -> float | None:
        """Root mean square of all differences."""
        return None if self._sums is None else math.sqrt(float(self._sums[5].mean()) / self.compared)

    @property
    def correlation(self) -> tuple[float, ...] | None:
        """Pearson's, per channel."""
        if self._sums is None:
            return None
        a, b, aa, bb, ab, _ = self._sums / self.compared
        return tuple(((ab - a * b) / ((aa - a * a) * (bb - b * b)).sqrt()).tolist())


def spread(count: int, shown: int) -> set[int]:
    """``shown`` places of ``count``, evenly spread; all of them when they are few."""
    return set(range(count)) if count <= shown else {index * count // shown for index in range(shown)}


def cut(image: Tensor, multiple: int, name: str) -> Tensor:
    """The middle of an image [3, H, W], its sides multiples of ``multiple`` pixels.

    Raises:
        FileError: a side is shorter than that.
    """
    height, width = (side - side % multiple for side in image.shape[1:])
    if not height or not width:
        raise FileError(f"{name}: is smaller than {multiple} pixels on a side")
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width].contiguous()


def agreement(ours: Subject, theirs: Subject) -> Agreement:
    """Of the latents that both have by name."""
    found = Agreement()
    for name in ours.names:
        mine, other = ours.mean_of(name), theirs.mean_of(name)
        if mine is not None and other is not None:
            found.add(mine, other)
    return found


def ranked(reconstructions: Sequence[Reconstruction]) -> list[Reconstruction]:
    """The worst first."""
    return sorted(reconstructions, key=lambda r: rank(r.psnr))


def rank(quality: float) -> float:
    """For sorting: what is not a number is the worst of all."""
    return -math.inf if math.isnan(quality) else quality


def _sample(mean: Tensor, logvar: Tensor, noise: torch.Generator) -> Tensor:
    """A sample of the posterior [z, h, w], which is what a U-Net is trained on."""
    return Moments(mean[None], logvar[None]).sample(torch.randn((1, *mean.shape), generator=noise))[0]
