"""Training an autoencoder against a discriminator: VQGAN's recipe (arXiv 2012.09841, section 3.2), which latent
diffusion (arXiv 2112.10752, appendix G) and SDXL's autoencoder go by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

WEIGHT_EPS = 1e-4
"""Added to the length of the adversarial gradient, as in VQGAN's code; its paper has 1e-6."""
MOST_WEIGHT = 1e4
"""The adaptive weight goes no higher, as there."""


def adversarial_loss(fake: Tensor) -> Tensor:
    """-mean D(x'): what a reconstruction should lower, whichever loss the discriminator has."""
    return -fake.mean()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """½ mean max(0, 1 - D(x)) + ½ mean max(0, 1 + D(x')): real logits should be above 1, fake ones below -1."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def vanilla(real: Tensor, fake: Tensor) -> Tensor:
    """The cross entropy, ½ mean softplus(-D(x)) + ½ mean softplus(D(x'))."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge, "vanilla": vanilla}


def adaptive_weight(likelihood: Tensor, adversarial: Tensor) -> Tensor:
    """How much the adversarial loss counts so that it pulls at the decoder's last layer as hard as the likelihood.

    |∇ nll| / (|∇ g| + 1e-4), at most 1e4 (VQGAN, equation 7).

    Args:
        likelihood: gradient of the negative log-likelihood by the weight of the last convolution.
        adversarial: that of the adversarial loss.
    """
    return (likelihood.norm() / (adversarial.norm() + WEIGHT_EPS)).clamp(0.0, MOST_WEIGHT)


def last_layer_gradient(conv: nn.Conv2d, features: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by a convolution's weight, when that by its output is known.

    So a loss is traced back to the picture once, and not again for its pull at the last layer; and the weight itself
    is not needed, wherever it is kept.

    Args:
        conv: the decoder's last layer.
        features: what it read [B, C, H, W].
        gradient: by what it gave [B, 3, H, W].
    """
    assert isinstance(conv.padding, tuple)
    return conv2d_weight(  # type: ignore[no-untyped-call]
        features.to(gradient), conv.weight.shape, gradient, conv.stride, conv.padding
    )


def with_gradient(output: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """A loss of this value, whose gradient by ``output`` is known already.

    Args:
        output: what the loss is of.
        value: a number.
        gradient: of the shape of ``output``.
    """
    return _WithGradient.apply(output, value.detach(), gradient)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None, None
