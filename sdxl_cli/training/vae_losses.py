"""What an autoencoder's reconstructions cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdxl_cli.model.vae import Moments
from sdxl_cli.training.adversarial import (
    adaptive_weight,
    adversarial_loss,
    last_layer_gradient,
    with_gradient,
)
from sdxl_cli.training.vae_config import AdversarialConfig, VAELossConfig

LOWPASS_BLOCKS = (8, 32)
"""Sides of the blocks whose averages are compared, in pixels."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Pairs of pictures [B, 3, H, W] in -1 … 1 -> distances [B]."""


def lowpass_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of block averages: what is left of an error when details are ignored.

    Args:
        prediction: [B, 3, H, W].
        target: the same.
    """
    difference = prediction - target
    blocks = [b for b in LOWPASS_BLOCKS if b <= min(difference.shape[-2:])]
    return torch.stack([F.avg_pool2d(difference, b).abs().mean() for b in blocks]).mean()


@dataclass(frozen=True, slots=True)
class ReconstructionLoss:
    """How unlike a picture its reconstruction is, and how much that and the latents cost.

    The original's negative log-likelihood of a picture is Σ (|x - x'| + w LPIPS) / exp(logvar) + logvar over all of
    its values, with one learned logvar (sgm ``GeneralLPIPSWithDiscriminator``); here Σ is N times the mean, and N is
    1 with ``reduction = "mean"``.
    """

    config: VAELossConfig
    perceptual: Distance | None = None
    """LPIPS, where it has a weight."""

    def terms(self, output: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Every difference of pictures [B, 3, H, W], as a mean over them, by the name of its weight."""
        terms = {
            "l1": (output - image).abs().mean(),
            "l2": (output - image).square().mean(),
            "lowpass": lowpass_l1(output, image),
        }
        return terms | ({"perceptual": self.perceptual(output, image).mean()} if self.perceptual else {})

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Their weighted sum, ``rec``: a mean per value."""
        start = torch.zeros((), device=terms["l1"].device)
        return sum((self._weight(name) * term for name, term in terms.items()), start)

    def likelihood(self, rec: Tensor, logvar: Tensor | None, values: int) -> Tensor:
        """The negative log-likelihood; without a learned ``logvar`` the difference itself.

        Args:
            rec: of :meth:`weighted`.
            logvar: a number, or None.
            values: of a picture, 3 · H · W.
        """
        nll = rec if logvar is None else rec / logvar.exp() + logvar
        return nll * values if self.config.reduction == "sum" else nll

    def divergence(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """The KL divergence from the standard normal in nats per latent value, and what it costs."""
        values = moments.mean[0].numel()
        kl = moments.kl().mean() / values
        return kl, self.config.kl * kl * (values if self.config.reduction == "sum" else 1)

    def _weight(self, name: str) -> float:
        return self.config.perceptual_weight if name == "perceptual" else float(getattr(self.config, name))


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """A batch, there and back."""

    image: Tensor
    """[B, 3, H, W] in -1 … 1."""
    output: Tensor
    """float32, of the same shape."""
    moments: Moments
    features: Tensor
    """What the decoder's last convolution read [B, C, H, W]."""


def without_adversary(
    loss: ReconstructionLoss, batch: Reconstructed, logvar: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """nll + kl, and every part of it by name."""
    terms = loss.terms(batch.output, batch.image)
    rec = loss.weighted(terms)
    kl, cost = loss.divergence(batch.moments)
    nll = loss.likelihood(rec, logvar, batch.image[0].numel())
    return nll + cost, numbers({**terms, "kl": kl}, rec, nll, logvar)


def with_adversary(
    loss: ReconstructionLoss,
    batch: Reconstructed,
    logvar: Tensor | None,
    discriminator: nn.Module,
    last: nn.Conv2d,
    config: AdversarialConfig,
) -> tuple[Tensor, dict[str, float]]:
    """nll + kl + λ · factor · g with g = -mean D(x') and λ = weight · :func:`adaptive_weight`.

    λ is of this batch on this device, as in the original; it passes no gradient on.

    Args:
        loss: of the reconstruction.
        batch: whose outputs have a graph.
        logvar: a number with a graph, or None.
        discriminator: its parameters get no gradient.
        last: the decoder's last convolution.
        config: weights.
    """
    picture = batch.output.detach().requires_grad_()
    terms = loss.terms(picture, batch.image)
    rec = loss.weighted(terms)
    values = batch.image[0].numel()
    fixed = None if logvar is None else logvar.detach()
    nll = loss.likelihood(rec, fixed, values)
    (down,) = torch.autograd.grad(nll, picture)
    adversarial = adversarial_loss(discriminator(picture).float())
    (up,) = torch.autograd.grad(adversarial, picture)
    pulls = [last_layer_gradient(last, batch.features.detach(), gradient) for gradient in (down, up)]
    weight = config.weight * adaptive_weight(*pulls)
    kl, cost = loss.divergence(batch.moments)
    scale = weight * config.factor
    total = with_gradient(batch.output, nll + scale * adversarial, down + scale * up) + cost
    if logvar is not None:
        # its own slope, which the gradient by the picture does not have
        slope = loss.likelihood(rec.detach(), logvar, values)
        total = total + (slope - slope.detach())
    said = numbers({**terms, "kl": kl}, rec, nll, logvar)
    return total, said | {"g": float(adversarial.detach()), "adaptive_weight": float(weight)}


def numbers(terms: Mapping[str, Tensor], rec: Tensor, nll: Tensor, logvar: Tensor | None) -> dict[str, float]:
    """For the log; what cannot differ from another number is left out."""
    found = {**terms, "rec": rec} | ({} if logvar is None else {"nll": nll, "logvar": logvar})
    return {name: float(value.detach()) for name, value in found.items()}
