"""Classifier-free guidance (arXiv 2207.12598): how strong, at which noise levels, and how its contrast is kept."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdxl_cli.diffusion.denoiser import Denoiser

OFF = (0.0, 1.0)
"""Scales without guidance. 1 is what the formula says; 0 is how diffusers' model cards write it."""

Pair = tuple[Tensor, Tensor]
"""Of the negative and of the positive side."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """How strong guidance is at each noise level."""

    scale: float
    """0 and 1 are no guidance, and then the negative side is not computed."""
    curve: tuple[tuple[float, float], ...] = ()
    """(sigma, scale), sigma descending: takes the place of ``scale``. In between it is linear in log sigma."""
    interval: tuple[float, float] = (0.0, math.inf)
    """Guidance only where lo < sigma <= hi (arXiv 2404.07724)."""
    rescale: float = 0.0
    """phi of arXiv 2305.08891, 0 … 1: how far the guided output is brought back to the positive one's deviation."""

    def scale_at(self, sigma: float) -> float:
        """The scale at a noise level; 1.0 where there is no guidance."""
        low, high = self.interval
        scale = self._on_curve(sigma) if self.curve else self.scale
        return scale if low < sigma <= high and scale not in OFF else 1.0

    def _on_curve(self, sigma: float) -> float:
        levels = [-level for level, _ in self.curve]  # ascending, as bisect wants them
        after = bisect.bisect_left(levels, -sigma)
        if after in (0, len(levels)) or levels[after] == -sigma:
            return self.curve[min(after, len(levels) - 1)][1]
        (high, above), (low, below) = self.curve[after - 1], self.curve[after]
        weight = math.log(high / sigma) / math.log(high / low)
        return above + weight * (below - above)


@dataclass(frozen=True, slots=True)
class Emphasis:
    """Other conditioning vectors while the noise is high (Fooocus "ADM guidance")."""

    vector: Pair
    """Each [B, adm]."""
    above: float
    """They are used where sigma > above."""


@dataclass(frozen=True, slots=True)
class Guided:
    """A denoiser pulled away from the negative condition and towards the positive one."""

    denoiser: Denoiser
    crossattn: Pair
    """Text features, each [B, T, ctx]."""
    vector: Pair
    """Conditioning vectors, each [B, adm]."""
    guidance: Guidance
    emphasis: Emphasis | None = None
    _texts: Tensor = field(init=False, repr=False)
    _vectors: Tensor = field(init=False, repr=False)
    _early_vectors: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # the very same tensors at every step: a network may remember what it made of them
        early = None if self.emphasis is None else torch.cat(self.emphasis.vector)
        object.__setattr__(self, "_texts", torch.cat(self.crossattn))
        object.__setattr__(self, "_vectors", torch.cat(self.vector))
        object.__setattr__(self, "_early_vectors", early)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The denoised latents, from output_neg + scale · (output_pos - output_neg).

        Both sides are in one batch, negative first (facts: sgm VanillaCFG); where there is no guidance, only the
        positive one is computed. Weights that sum to 1 may be applied before or after going from the network's
        output to D; for ``rescale`` it has to be before, as in diffusers.

        Args:
            x: noisy latents [B, C, h, w].
            sigma: noise level.
        """
        scale, conditions = self.guidance.scale_at(sigma), self._conditions(sigma)
        if scale == 1.0:
            return self.denoiser(x, sigma, *conditions)
        both = self.denoiser.predict(x, sigma, *conditions)
        negative, positive = both.chunk(2)
        output = negative + scale * (positive - negative)
        if self.guidance.rescale:
            output = rescaled(output, positive, self.guidance.rescale)
        return self.denoiser.denoised(output, x, sigma)

    def needs(self, sigmas: Iterable[float]) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """What the network will be given at these noise levels.

        Args:
            sigmas: the levels at which the sampler will look.

        Yields:
            Text features and vectors, the very same tensors as later, and the indices with which they come.
        """
        found: dict[tuple[int, int], tuple[Tensor, Tensor, list[int]]] = {}
        for sigma in sigmas:
            text, vector = self._conditions(sigma)
            _, _, indices = found.setdefault((id(text), id(vector)), (text, vector, []))
            if (index := self.denoiser.schedule.index_of(sigma)) not in indices:
                indices.append(index)
        yield from found.values()

    def _conditions(self, sigma: float) -> Pair:
        """Text features and vectors at a noise level: of both sides, or of the positive one where it is alone."""
        vector, vectors = self.vector, self._vectors
        if self.emphasis is not None and sigma > self.emphasis.above:
            assert self._early_vectors is not None
            vector, vectors = self.emphasis.vector, self._early_vectors
        if self.guidance.scale_at(sigma) == 1.0:
            return self.crossattn[1], vector[1]
        return self._texts, vectors


def rescaled(output: Tensor, positive: Tensor, phi: float) -> Tensor:
    """Give a guided output the deviation of the positive one, for the share phi (arXiv 2305.08891, eq. 14 to 16).

    Args:
        output: guided, in the network's own terms [B, C, h, w].
        positive: what the network said for the prompt [B, C, h, w].
        phi: 0 changes nothing, 1 brings it back in full; the paper uses 0.7.
    """
    deviations = (values.std(dim=(1, 2, 3), keepdim=True) for values in (positive, output))
    ratio = next(deviations) / next(deviations)
    return output * (phi * ratio + (1.0 - phi))
