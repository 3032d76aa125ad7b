"""Loss terms, beside other people's formulas and implementations."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sdxl_cli.diffusion.denoiser import to_denoised
from sdxl_cli.diffusion.schedule import sigma_table
from sdxl_cli.model.vae import Moments
from sdxl_cli.training.losses import add_noise, min_snr_weight, training_noise, weighted_mse
from sdxl_cli.training.vae_losses import lowpass_l1

LEVELS = torch.tensor([0, 1, 199, 500, 999])
SIGMAS = sigma_table()[LEVELS]


@pytest.fixture
def peer() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture
def latent() -> Tensor:
    return torch.randn(5, 4, 8, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(5, 4, 8, 6, generator=torch.Generator().manual_seed(1))


def test_the_networks_input_is_that_of_diffusers(peer: DDPMScheduler, latent: Tensor, noise: Tensor) -> None:
    noised = add_noise(latent, noise, SIGMAS, "eps", 0.0)
    torch.testing.assert_close(
        noised.network_input, peer.add_noise(latent, noise, LEVELS), rtol=1e-4, atol=1e-5
    )


def test_the_targets_are_noise_and_velocity(peer: DDPMScheduler, latent: Tensor, noise: Tensor) -> None:
    assert add_noise(latent, noise, SIGMAS, "eps", 0.0).target is noise
    velocity = add_noise(latent, noise, SIGMAS, "v", 0.0).target
    torch.testing.assert_close(velocity, peer.get_velocity(latent, noise, LEVELS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_network_that_says_the_target_denoises_perfectly(
    prediction: Literal["eps", "v", "x0"], latent: Tensor, noise: Tensor
) -> None:
    target = add_noise(latent, noise, SIGMAS, prediction, 0.0).target
    sigma = SIGMAS.view(-1, 1, 1, 1)
    denoised = to_denoised(prediction, target, latent + sigma * noise, sigma)
    torch.testing.assert_close(denoised, latent, rtol=1e-4, atol=1e-4)


def test_the_eps_loss_is_the_originals_weighted_distance_of_denoised_samples(
    latent: Tensor, noise: Tensor
) -> None:
    """facts: w (D - x)², w = sigma⁻²."""
    output = 0.9 * noise + 0.1
    loss, per_sample = weighted_mse(output, add_noise(latent, noise, SIGMAS, "eps", 0.0))
    sigma = SIGMAS.double().view(-1, 1, 1, 1)
    denoised = latent.double() + sigma * noise.double() - sigma * output.double()
    expected = ((denoised - latent.double()) ** 2 / sigma**2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(per_sample.double(), expected, rtol=2e-4, atol=0)
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=2e-4, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights_are_those_of_diffusers_training_scripts(
    peer: DDPMScheduler, prediction: Literal["eps", "v"]
) -> None:
    snr = compute_snr(peer, LEVELS)
    capped = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1).values
    expected = capped / (snr if prediction == "eps" else snr + 1)
    torch.testing.assert_close(min_snr_weight(prediction, SIGMAS, 5.0), expected, rtol=1e-4, atol=0)


def test_min_snr_weights_of_x0_are_those_of_eps_times_snr() -> None:
    """The squared errors of x0 and eps differ by the factor SNR, whatever the network says."""
    x0, eps = (min_snr_weight(name, SIGMAS, 5.0) for name in ("x0", "eps"))
    torch.testing.assert_close(x0, eps / SIGMAS.square())


def test_min_snr_off_weighs_all_levels_alike() -> None:
    assert min_snr_weight("eps", SIGMAS, 0.0).tolist() == [1.0] * 5


def test_the_weights_multiply_each_samples_loss(latent: Tensor, noise: Tensor) -> None:
    noised = add_noise(latent, noise, SIGMAS, "eps", 5.0)
    loss, per_sample = weighted_mse(torch.zeros_like(noise), noised)
    weights = np.minimum(1 / SIGMAS.numpy() ** 2, 5) * SIGMAS.numpy() ** 2
    np.testing.assert_allclose(loss, (weights * (noise.numpy() ** 2).mean((1, 2, 3))).mean(), rtol=1e-5)
    np.testing.assert_allclose(per_sample, (noise.numpy() ** 2).mean((1, 2, 3)), rtol=1e-5)


def test_offset_noise_shifts_all_of_a_sample_by_one_number() -> None:
    """facts: one scalar per sample, all channels."""
    draw = lambda offset: training_noise((4000, 4, 4, 4), offset, torch.Generator().manual_seed(3))  # noqa: E731
    shift = draw(0.5) - draw(0.0)
    assert float(shift.flatten(1).std(dim=1).max()) < 1e-6
    per_sample = shift[:, 0, 0, 0] / 0.5
    assert abs(float(per_sample.mean())) < 0.05
    assert abs(float(per_sample.std()) - 1) < 0.05


def test_noise_without_offset_is_standard_normal() -> None:
    noise = training_noise((1000, 4, 8, 8), 0.0, torch.Generator().manual_seed(4))
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01


def test_lowpass_compares_averages_of_blocks() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 3, 64, 96))
    expected = []
    for side in (8, 32):
        blocks = (a - b).reshape(2, 3, 64 // side, side, 96 // side, side).mean((3, 5))
        expected.append(np.abs(blocks).mean())
    np.testing.assert_allclose(lowpass_l1(torch.tensor(a), torch.tensor(b)), np.mean(expected), rtol=1e-10)


def test_lowpass_leaves_out_blocks_larger_than_the_crop() -> None:
    a, b = torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blocks = (a - b).reshape(1, 3, 2, 8, 2, 8).mean((3, 5))
    torch.testing.assert_close(lowpass_l1(a, b), blocks.abs().mean())


def test_kl_is_that_of_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 5, 6, generator=generator)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(Moments(mean, logvar).kl(), expected, rtol=1e-4, atol=1e-4)
