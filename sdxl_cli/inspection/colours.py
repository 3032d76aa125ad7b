"""How much of a picture a linear map of its latents shows: the map fitted to pictures, and the one previews use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdxl_cli.generation.preview import LatentColours
from sdxl_cli.inspection.families import colour_likeness


@dataclass(frozen=True, kw_only=True, slots=True)
class ColourReport:
    """Latents times the scale factor to colours in -1 … 1, over all positions of all pictures."""

    positions: int
    weight: tuple[tuple[float, ...], ...]
    """[z][3], by least squares."""
    bias: tuple[float, ...]
    r2: float
    """Share of the colours' variance that the fitted map explains, all colours together."""
    r2_rgb: tuple[float, ...]
    """Of red, green and blue."""
    preview_r2: float | None
    """The same of the map that previews use; None without an autoencoder to fit that to."""
    like: dict[str, float]
    """Family -> cosine between its published map and this one, -1 … 1."""


class ColourFit:
    """Gathers what least squares needs, picture by picture: sums of products in float64."""

    def __init__(self, channels: int) -> None:
        side = channels + 1
        self.positions = 0
        self._inputs = torch.zeros(side, side, dtype=torch.float64)
        self._mixed = torch.zeros(side, 3, dtype=torch.float64)
        self._outputs = torch.zeros(3, dtype=torch.float64)

    def add(self, latent: Tensor, image: Tensor) -> None:
        """A latent [z, h, w] times the scale factor, and its picture [3, H, W] in -1 … 1; NaN is left out."""
        factor = image.shape[-1] // latent.shape[-1]
        colours = F.avg_pool2d(image[None].double(), factor)[0].flatten(1)
        inputs = torch.cat([latent.double().flatten(1), torch.ones_like(colours[:1])])
        whole = torch.isfinite(inputs).all(dim=0)
        inputs, colours = inputs[:, whole], colours[:, whole]
        self.positions += int(whole.sum())
        self._inputs += inputs @ inputs.T
        self._mixed += inputs @ colours.T
        self._outputs += colours.square().sum(dim=1)

    def solve(self) -> LatentColours:
        """The map with the smallest squared error; of several, the one with the smallest numbers."""
        solution = torch.linalg.lstsq(self._inputs, self._mixed, driver="gelsd").solution
        return LatentColours(solution[:-1].float(), solution[-1].float())

    def r2(self, colours: LatentColours) -> list[float]:
        """Share of the variance of red, green and blue that a map explains, and of all together; below 0 it is worse
        than the mean colour.
        """
        matrix = torch.cat([colours.weight, colours.bias[None]]).double()
        error = self._outputs - 2 * (matrix * self._mixed).sum(dim=0)
        error = error + (matrix * (self._inputs @ matrix)).sum(dim=0)
        mean = self._mixed[-1] / self.positions
        total = self._outputs - self.positions * mean.square()
        shares: list[float] = (1 - error / total).tolist()
        return [*shares, float(1 - error.sum() / total.sum())]

    def report(self, preview: LatentColours | None) -> ColourReport:
        """What was found; ``preview`` is the map that previews use."""
        fitted = self.solve()
        weight: list[list[float]] = fitted.weight.tolist()
        *rgb, whole = self.r2(fitted)
        return ColourReport(
            positions=self.positions,
            weight=tuple(map(tuple, weight)),
            bias=tuple(fitted.bias.tolist()),
            r2=whole,
            r2_rgb=tuple(rgb),
            preview_r2=self.r2(preview)[-1] if preview is not None else None,
            like=colour_likeness(weight),
        )
