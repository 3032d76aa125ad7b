"""The autoencoder computes what diffusers' computes from the same weights, and a mistake would show."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from sdxl_kernels import convolution
from torch import Tensor, nn

from sdxl_cli.model import vae as ours
from sdxl_cli.model.config import VAEConfig
from tests.model.peers import BASE, diffusers_vae, randomize, relative

BOUND = 3e-5
"""What rounding may do: measured 1e-6 … 7e-6."""
VISIBLE = 1e-4


@dataclass
class Case:
    """Our autoencoder, an image and a latent, and what diffusers makes of them."""

    network: ours.Autoencoder
    image: Tensor
    z: Tensor
    posterior: Any
    decoded: Tensor

    @torch.no_grad()
    def errors(self, network: ours.Autoencoder | None = None) -> dict[str, float]:
        network = network or self.network
        moments = network.encode(self.image)
        return {
            "mean": relative(moments.mean, self.posterior.mean),
            "logvar": relative(moments.logvar, self.posterior.logvar),
            "decoded": relative(network.decode(self.z), self.decoded),
        }


@torch.no_grad()
def make_case(
    config: VAEConfig, batch: int, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Case:
    network = ours.Autoencoder(config)
    randomize(network).to(dtype)
    theirs = diffusers_vae(network, config)
    torch.manual_seed(2)
    height, width = size
    down = config.downsampling
    image = torch.rand(batch, 3, height, width, dtype=dtype) * 2 - 1
    z = torch.randn(batch, 4, height // down, width // down, dtype=dtype) * 3
    return Case(network, image, z, theirs.encode(image).latent_dist, theirs.decode(z).sample)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(BASE.vae, 2, (48, 24))


@pytest.mark.parametrize(("batch", "size"), [(2, (64, 40)), (1, (24, 104)), (3, (8, 8))])
def test_same_weights_same_moments_and_images(batch: int, size: tuple[int, int]) -> None:
    errors = make_case(BASE.vae, batch, size).errors()
    print(f"VAE {size}:", {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < BOUND


def test_nothing_but_rounding_is_between_us() -> None:
    errors = make_case(BASE.vae, 2, (40, 24), torch.float64).errors()
    print("VAE in double precision:", {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-12


def test_four_times_downsampling_too() -> None:
    """The smaller autoencoders that training grows from."""
    errors = make_case(replace(BASE.vae, channel_mult=(1, 2, 4), num_res_blocks=1), 1, (20, 12)).errors()
    assert max(errors.values()) < BOUND


@torch.no_grad()
def test_the_posterior_is_the_same(case: Case) -> None:
    """Sample, mode and divergence, with log variances beyond both ends of -30 … 20."""
    mean, raw = torch.randn(2, 4, 3, 5), torch.linspace(-60, 60, 120).view(2, 4, 3, 5)
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    theirs = DiagonalGaussianDistribution(torch.cat([mean, raw], dim=1))
    network = copy.deepcopy(case.network)
    network.encoder = nn.Identity()
    network.quant_conv = nn.Identity()
    moments = network.encode(torch.cat([mean, raw], dim=1))
    assert torch.equal(moments.mode(), theirs.mode())
    assert torch.equal(moments.logvar, theirs.logvar)
    assert torch.allclose(moments.kl(), theirs.kl(), rtol=1e-5)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    sample = theirs.sample(torch.Generator().manual_seed(5))
    assert torch.allclose(moments.sample(noise), sample, rtol=1e-6)


def test_latents_are_scaled_by_the_released_factor() -> None:
    network = ours.Autoencoder(VAEConfig(channels=8, norm_groups=4))
    z = torch.randn(1, 4, 2, 2)
    assert torch.allclose(network.to_latent(z), z * 0.13025)
    assert torch.allclose(network.from_latent(network.to_latent(z)), z)


def test_every_normalization_has_the_right_epsilon(case: Case) -> None:
    """1e-6 everywhere. Each is exchanged alone: none hides behind another."""
    network = copy.deepcopy(case.network)
    seen = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.GroupNorm):
            assert module.eps == 1e-6
            module.eps = 1e-5
            seen[path] = max(case.errors(network).values())
            module.eps = 1e-6
    print(f"{len(seen)} norms, the least visible {min(seen.values()):.1e}")
    assert max(case.errors(network).values()) < BOUND
    assert min(seen.values()) > VISIBLE


def padded(*sides: int) -> Any:
    return lambda x, w, b: F.conv2d(F.pad(x, sides), w, b, stride=2)


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "downsampling padded as in the U-Net": (
        "downsample_conv_asymmetric",
        convolution.downsample_conv,
        "mean",
    ),
    "padded above and to the left": ("downsample_conv_asymmetric", padded(1, 0, 1, 0), "mean"),
    "padded above and to the right": ("downsample_conv_asymmetric", padded(0, 1, 1, 0), "mean"),
    "scores not divided by the root of the width": (
        "attention",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
        "decoded",
    ),
    "several heads": (
        "attention",
        lambda q, k, v: rearrange(
            F.scaled_dot_product_attention(
                *(rearrange(t, "b 1 l (n d) -> b n l d", d=32) for t in (q, k, v))
            ),
            "b n l d -> b 1 l (n d)",
        ),
        "decoded",
    ),
    "queries and keys exchanged": (
        "attention",
        lambda q, k, v: F.scaled_dot_product_attention(k, q, v),
        "decoded",
    ),
    "no activation after the norms": (
        "group_norm_silu",
        lambda x, groups, w, b, eps: F.group_norm(x, groups, w, b, eps),
        "decoded",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(case: Case, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, where = MISTAKES[mistake]
    monkeypatch.setattr(ours, name, wrong)
    error = case.errors()[where]
    print(f"{mistake}: {error:.1e}")
    assert error > VISIBLE
