"""Every term of the autoencoder's loss and its gradients, against formulas written out and against VQGAN's code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from sdxl_cli.model.config import VAEConfig
from sdxl_cli.model.discriminator import PatchDiscriminator, initialize
from sdxl_cli.model.vae import Autoencoder, Moments
from sdxl_cli.training import growing
from sdxl_cli.training.adversarial import DISCRIMINATOR_LOSSES, adaptive_weight, last_layer_gradient
from sdxl_cli.training.vae_config import AdversarialConfig, VAELossConfig
from sdxl_cli.training.vae_losses import Reconstructed, ReconstructionLoss, lowpass_l1, without_adversary
from sdxl_cli.training.vae_task import LearnedScale, VAETask, fresh
from tests.training.small import vae_config

SMALL = VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=2)
ORIGINAL = VAELossConfig(
    l1=1.0,
    l2=0.0,
    perceptual="vgg",
    perceptual_weight=0.25,
    learn_logvar=True,
    logvar=-0.7,
    kl=1e-3,
    reduction="sum",
)


class Features(nn.Module):
    """A distance of pictures that is not that of pixels, in the place of LPIPS: [B]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 6, 5, stride=2)
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (F.relu(self.conv(a)) - F.relu(self.conv(b))).square().mean((1, 2, 3))


def images(count: int = 3, side: int = 40) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


def task(adversarial: AdversarialConfig, loss: VAELossConfig = ORIGINAL, **loop: Any) -> VAETask:
    torch.manual_seed(0)
    vae = Autoencoder(SMALL)
    growing.initialize(vae)
    discriminator = PatchDiscriminator(channels=8)
    initialize(discriminator)
    config = vae_config(
        crop_sizes=(32,),
        crop_weights=(1.0,),
        pixels_per_step=0,
        batch_size=3,
        loss=loss,
        adversarial=adversarial,
        **loop,
    )
    module = LearnedScale(fresh(vae), loss.logvar) if loss.learn_logvar else fresh(vae)
    return VAETask(module, list(images()), config, perceptual=Features(), discriminator=fresh(discriminator))


def original_parts(made: VAETask) -> dict[str, Tensor]:
    """The original's training step of the autoencoder, from its formulas: every pixel on its own, summed per picture.

    ``x``, ``x'`` and everything that ``GeneralLPIPSWithDiscriminator`` of the generative-models repository makes of
    them with ``optimizer_idx`` 0.
    """
    drawn = made._draw(0, torch.Generator().manual_seed(9))
    x = drawn.image
    moments = made.module.encode(x)
    posterior = Normal(moments.mean, (0.5 * moments.logvar).exp())
    y = made.module.decode(posterior.mean + posterior.stddev * drawn.noise)
    assert made.perceptual
    assert made.discriminator
    assert isinstance(made.module, LearnedScale)
    rec = (x - y).abs() + 0.25 * made.perceptual(x, y).view(-1, 1, 1, 1)
    nll = (rec / made.module.logvar.exp() + made.module.logvar).sum() / len(x)
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum() / len(x)
    g = -made.discriminator(y).mean()
    last = made.module.decoder.conv_out.weight
    down, up = (torch.autograd.grad(value, last, retain_graph=True)[0] for value in (nll, g))
    weight = 0.5 * torch.clamp(torch.norm(down) / (torch.norm(up) + 1e-4), 0.0, 1e4).detach()
    loss = nll + 1e-3 * kl + weight * 0.8 * g
    return {"loss": loss, "nll": nll, "rec": rec.mean(), "g": g, "adaptive_weight": weight, "x": x, "y": y}


def test_the_autoencoders_step_is_the_originals() -> None:
    made = task(AdversarialConfig(weight=0.5, factor=0.8))
    expected = original_parts(made)
    expected["loss"].backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in made.module.named_parameters()}
    made.module.zero_grad()
    loss, said = made.step(0, torch.Generator().manual_seed(9))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-6, atol=0)
    for name in ("nll", "rec", "g", "adaptive_weight"):
        assert said[name] == pytest.approx(float(expected[name].detach()), rel=1e-5), name
    assert said["logvar"] == pytest.approx(-0.7)
    # attention's key biases, for one, have a gradient of 0 but for rounding
    noise = 1e-6 * max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for name, p in made.module.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=noise)
    assert float(made.module.get_parameter("logvar").grad.abs()) > 0  # type: ignore[union-attr]


def test_without_logvar_the_error_itself_is_weighed() -> None:
    loss = replace(ORIGINAL, learn_logvar=False)
    made = task(AdversarialConfig(weight=0.5), loss)
    total, said = made.step(0, torch.Generator().manual_seed(9))
    nll = said["rec"] * 3 * 32 * 32
    kl = 1e-3 * said["kl"] * 4 * 8 * 8
    assert float(total.detach()) == pytest.approx(nll + kl + said["adaptive_weight"] * said["g"], rel=1e-5)
    assert "logvar" not in said


def test_the_discriminators_step_is_the_originals() -> None:
    """Its own formulas, on the autoencoder as it is after its own step; and nothing of it reaches the autoencoder."""
    made = task(AdversarialConfig(weight=0.5, factor=0.8))
    made.step(0, torch.Generator().manual_seed(9))
    with torch.no_grad():
        for p in made.module.parameters():
            p.mul_(0.9)
    parts = original_parts(made)
    assert made.discriminator
    real, fake = made.discriminator(parts["x"]), made.discriminator(parts["y"].detach())
    expected = 0.8 * 0.5 * (torch.relu(1.0 - real).mean() + torch.relu(1.0 + fake).mean())
    wanted = torch.autograd.grad(expected, list(made.discriminator.parameters()))
    made.discriminator.zero_grad()
    made.module.zero_grad()
    loss, said = made.discriminate(0, torch.Generator().manual_seed(9))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected)
    assert said["logits_real"] == pytest.approx(float(real.detach().mean()), rel=1e-5)
    assert said["logits_fake"] == pytest.approx(float(fake.detach().mean()), rel=1e-5)
    for p, gradient in zip(made.discriminator.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in made.module.parameters())


def test_before_its_start_the_discriminator_has_no_say() -> None:
    made = task(AdversarialConfig(weight=0.5, start=3), accumulate=2)
    early, said = made.step(5, torch.Generator().manual_seed(9))
    assert "g" not in said
    alone, _ = task(AdversarialConfig()).step(0, torch.Generator().manual_seed(9))
    torch.testing.assert_close(early, alone)
    _, said = made.step(6, torch.Generator().manual_seed(9))
    assert "g" in said, "batches 6 and 7 make up step 3"
    assert [turn.since for turn in made.turns] == [0, 3]


def test_the_discriminators_losses_are_hinges_and_cross_entropy() -> None:
    real, fake = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 2
    a, b = real.double().numpy(), fake.double().numpy()
    hinge = 0.5 * (np.maximum(0, 1 - a).mean() + np.maximum(0, 1 + b).mean())
    assert float(DISCRIMINATOR_LOSSES["hinge"](real, fake)) == pytest.approx(hinge, rel=1e-6)
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    entropy = F.binary_cross_entropy_with_logits(real, one) + F.binary_cross_entropy_with_logits(fake, zero)
    torch.testing.assert_close(DISCRIMINATOR_LOSSES["vanilla"](real, fake), 0.5 * entropy)


def test_the_last_layers_gradient_is_autograds() -> None:
    conv = nn.Conv2d(5, 3, 3, padding=1)
    features = torch.randn(2, 5, 9, 7).requires_grad_()
    output = conv(features)
    loss = output.pow(3).mean()
    gradient, expected = torch.autograd.grad(loss, [output, conv.weight])
    torch.testing.assert_close(last_layer_gradient(conv, features.detach(), gradient), expected)


def test_the_adaptive_weight_is_bounded() -> None:
    zero, one = torch.zeros(3), torch.ones(4)
    assert float(adaptive_weight(one, zero)) == 1e4
    assert float(adaptive_weight(zero, one)) == 0.0
    assert float(adaptive_weight(one, one)) == pytest.approx(2 / (2 + 1e-4))


def test_losses_and_adaptive_weight_are_those_of_vqgans_code() -> None:
    theirs = pytest.importorskip("taming.modules.losses.vqperceptual")
    patch = pytest.importorskip("taming.modules.discriminator.model")
    real, fake = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 2
    torch.testing.assert_close(DISCRIMINATOR_LOSSES["hinge"](real, fake), theirs.hinge_d_loss(real, fake))
    torch.testing.assert_close(DISCRIMINATOR_LOSSES["vanilla"](real, fake), theirs.vanilla_d_loss(real, fake))
    peer = patch.NLayerDiscriminator(n_layers=3)
    ours = PatchDiscriminator()
    assert list(ours.state_dict()) == list(peer.state_dict())
    peer.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images()), peer(images()))
    torch.manual_seed(1)
    initialize(ours)
    torch.manual_seed(1)
    peer.apply(patch.weights_init)
    for name, value in peer.main.named_parameters():
        if not (name.startswith(("0.", "11.")) and name.endswith("bias")):
            assert torch.equal(ours.main.get_parameter(name), value), name
    layer = nn.Conv2d(3, 3, 1)
    output = layer(images())
    nll, g = output.square().sum(), output.mean()
    weight = theirs.VQLPIPSWithDiscriminator.calculate_adaptive_weight(
        type("Bare", (), {"discriminator_weight": 0.5})(), nll, g, layer.weight
    )
    pulls = [torch.autograd.grad(value, layer.weight, retain_graph=True)[0] for value in (nll, g)]
    torch.testing.assert_close(0.5 * adaptive_weight(*pulls), weight)


def test_the_plain_loss_is_the_weighted_sum_of_means() -> None:
    output, image = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moments = Moments(*torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1)))
    config = VAELossConfig(l1=0.7, l2=0.3, lowpass=2.0, kl=0.01)
    batch = Reconstructed(image, output, moments, image)
    loss, terms = without_adversary(ReconstructionLoss(config), batch, None)
    difference = (output - image).numpy()
    posterior = Normal(moments.mean, (0.5 * moments.logvar).exp())
    expected = {
        "l1": np.abs(difference).mean(),
        "l2": (difference**2).mean(),
        "lowpass": float(lowpass_l1(output, image)),
        "kl": float(kl_divergence(posterior, Normal(0.0, 1.0)).mean()),
    }
    rec = 0.7 * expected["l1"] + 0.3 * expected["l2"] + 2.0 * expected["lowpass"]
    assert terms == pytest.approx({**expected, "rec": rec}, rel=1e-5)
    assert float(loss) == pytest.approx(rec + 0.01 * expected["kl"], rel=1e-5)
