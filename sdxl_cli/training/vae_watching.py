"""Looking on while an autoencoder learns: reconstructions as pictures and in numbers, and files of its stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.console import get as console
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.picture import Texts, write_picture
from sdxl_cli.metrics.similarity import psnr, ssim
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.loop import Run
from sdxl_cli.training.metrics import Mean, merged
from sdxl_cli.training.vae_losses import Distance

FOLDER = "samples"
MAGNIFIED = 3.0
"""How much larger errors are drawn than they are (the original's ``diff_boost_factor``)."""
GAP = 4
"""White pixels between pictures of a sheet."""
LEAST_SIDE = {"ssim": 11, "lpips": 16}
"""Pictures with a smaller side have no such number."""


@torch.no_grad()
def reconstruct(vae: Autoencoder, image: Tensor) -> Tensor:
    """There and back through the most likely latent, [3, H, W] in -1 … 1 each; on the CPU, cut off at the ends."""
    device = next(vae.parameters()).device
    output = vae.decode(vae.encode(image[None].to(device)).mode())
    return output[0].float().cpu().clamp(-1, 1)


def sheet(images: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """Pictures in a row, their reconstructions below, and below those the errors, three times as large on grey.

    Args:
        images: [3, H, W] in -1 … 1, all of one size.
        outputs: likewise.

    Returns:
        [3, 3 H + gaps, n W + gaps] in 0 … 1.
    """
    errors = [(MAGNIFIED * (b - a)).clamp(-1, 1) for a, b in zip(images, outputs, strict=True)]
    _, height, width = images[0].shape
    across, down = width + GAP, height + GAP
    page = torch.ones(3, 3 * down - GAP, len(images) * across - GAP)
    for y, row in enumerate((images, outputs, errors)):
        for x, picture in enumerate(row):
            page[:, y * down : y * down + height, x * across : x * across + width] = (picture + 1) / 2
    return page


@dataclass(frozen=True, slots=True)
class Reconstructions:
    """Draws the same pictures every so many steps through the averaged weights: ``samples/000500.png``."""

    vae: Autoencoder
    """In training."""
    images: Sequence[Tensor]
    side: int
    """Of the middle of each that is drawn, in pixels."""
    folder: Path
    every: int

    def after_step(self, run: Run, done: int) -> None:
        """See :class:`~sdxl_cli.training.loop.Watcher`."""
        if done % self.every and done != run.config.max_steps:
            return
        middles = [middle(image, self.side) for image in self.images]
        with run.shown() as module:
            if module is None:
                return
            outputs = [reconstruct(self.vae, image) for image in middles]
        path = self.folder / FOLDER / f"{done:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = [float(psnr(a[None], b[None])) for a, b in zip(middles, outputs, strict=True)]
        said = f"sdxl train-vae, step {done}; PSNR {', '.join(f'{level:.2f}' for level in levels)} dB"
        pixels = sheet(middles, outputs).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        # a resumed run draws its last step again
        write_picture(path, pixels, Texts(said), overwrite=True)
        console().note(f"step {done}: {path}, PSNR {sum(levels) / len(levels):.2f} dB")


def common_side(images: Sequence[Tensor], wanted: int, factor: int) -> int:
    """Of the squares that are drawn, in pixels: ``wanted``, or what the smallest picture has, as a multiple of
    ``factor``, which the autoencoder shrinks by.

    Raises:
        UsageError: a picture has less than one latent pixel.
    """
    side = min(wanted, *(min(image.shape[-2:]) for image in images))
    if side < factor:
        raise UsageError(
            f"a picture to draw has a side of {side} pixels, the autoencoder needs {factor}; leave it out of "
            "--validation, or --set sample_images=0"
        )
    return side // factor * factor


def middle(image: Tensor, side: int) -> Tensor:
    """The square in the middle of [3, H, W]; of a side that is shorter, all."""
    top, left = (max(0, (length - side) // 2) for length in image.shape[-2:])
    return image[:, top : top + side, left : left + side]


@dataclass(frozen=True, slots=True)
class VAEValidation:
    """Measures the averaged weights on held-out pictures every so many steps: ``validation_…`` in metrics.jsonl.

    Whole pictures go through their most likely latents, so the numbers of two steps differ by the weights alone.
    """

    vae: Autoencoder
    images: Sequence[Tensor]
    perceptual: Distance | None
    """LPIPS, where its weights are there for the loss."""
    every: int

    def after_step(self, run: Run, done: int) -> None:
        """See :class:`~sdxl_cli.training.loop.Watcher`."""
        if done % self.every and done != run.config.max_steps:
            return
        with run.shown() as module:
            if module is None:
                return
            means = self.measure()
        run.log.write({"step": done, **{f"validation_{name}": value for name, value in means.items()}})
        console().note(f"step {done}: validation PSNR {means['psnr']:.2f} dB")

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Means over the pictures of ``l1``, ``psnr``, and where sides are long enough ``ssim`` and ``lpips``."""
        rows = []
        for image in self.images:
            pair = image[None], reconstruct(self.vae, image)[None]
            row = {"l1": (pair[0] - pair[1]).abs().mean(), "psnr": psnr(*pair)}
            side = min(image.shape[-2:])
            if side >= LEAST_SIDE["ssim"]:
                row["ssim"] = ssim(*pair)
            if self.perceptual and side >= LEAST_SIDE["lpips"]:
                device = next(self.vae.parameters()).device
                row["lpips"] = self.perceptual(*(picture.to(device) for picture in pair))
            rows.append({name: Mean(float(value), 1) for name, value in row.items()})
        return merged(rows)


@dataclass(frozen=True, slots=True)
class SaveAutoencoders:
    """Keeps an autoencoder file of every so many steps: ``vae-000500.safetensors``."""

    write: Callable[[Path, Mapping[str, Tensor]], None]
    """Takes the averages."""
    folder: Path
    every: int

    def after_step(self, run: Run, done: int) -> None:
        """See :class:`~sdxl_cli.training.loop.Watcher`."""
        if done % self.every == 0 and (shipped := run.shipped()) is not None:
            self.write(self.folder / f"vae-{done:06d}.safetensors", shipped)
