"""The released sizes, with random weights, against diffusers and transformers holding the same tensors.

Minutes on one core, 12 GB; run with ``-m full_size -rP`` to see the numbers.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from sdxl_cli.model.conditioning import MicroConditioning, conditioning_vector
from sdxl_cli.model.config import BASE, BIG_G, CLIP_L, REFINER, ModelConfig
from sdxl_cli.model.text import ClipLEmbedder, OpenClipEmbedder
from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder
from tests.model.peers import (
    diffusers_unet,
    diffusers_vae,
    randomize,
    relative,
    transformers_big_g,
    transformers_clip_l,
)

pytestmark = pytest.mark.full_size

BOUND = 1e-4
MICRO = MicroConditioning(original_size=(768, 1344), crop_top_left=(0, 96), target_size=(832, 1216))


@contextmanager
def measured(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - start:.1f} s, peak so far {peak:.1f} GiB")


def random_unet(config: ModelConfig) -> UNet:
    """Memory is taken once: no initial values that are thrown away."""
    with torch.device("meta"):
        network = UNet(config.unet)
    network.to_empty(device="cpu")
    with measured("random weights"):
        randomize(network)
    return network


@torch.no_grad()
@pytest.mark.parametrize("config", [BASE, REFINER], ids=["base", "refiner"])
def test_the_unet(config: ModelConfig) -> None:
    """Two samples of 256x192 pixels, 77 tokens."""
    network = random_unet(config)
    torch.manual_seed(1)
    x, t = torch.randn(2, 4, 32, 24), torch.tensor([999, 123])
    context, pooled = torch.randn(2, 77, config.unet.context_dim), torch.randn(2, 1280)
    with measured("ours"):
        ours = network(x, t, context, conditioning_vector(config, pooled, [MICRO] * 2))
    last = [MICRO.aesthetic_score] if config.is_refiner else list(MICRO.target_size)
    numbers = torch.tensor([[*MICRO.original_size, *MICRO.crop_top_left, *last]] * 2)
    theirs = diffusers_unet(network, config)
    with measured("diffusers"):
        expected = theirs(
            x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": numbers}
        ).sample
    error = relative(ours, expected)
    print(f"largest difference {error:.1e} of the output's rms {float(expected.square().mean().sqrt()):.2f}")
    assert error < BOUND


@torch.no_grad()
def test_the_autoencoder() -> None:
    """256x256 pixels."""
    network = Autoencoder(BASE.vae)
    randomize(network)
    theirs = diffusers_vae(network, BASE.vae)
    torch.manual_seed(1)
    image, z = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randn(1, 4, 32, 32)
    with measured("ours"):
        moments, decoded = network.encode(image), network.decode(z)
    with measured("diffusers"):
        posterior, image = theirs.encode(image).latent_dist, theirs.decode(z).sample
    errors = {
        "mean": relative(moments.mean, posterior.mean),
        "logvar": relative(moments.logvar, posterior.logvar),
        "image": relative(decoded, image),
    }
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < BOUND


def token_ids(pad: int) -> Tensor:
    torch.manual_seed(1)
    rows = [
        [49406, *torch.randint(1, 49406, (length,)).tolist(), 49407] + [pad] * (75 - length)
        for length in (9, 75)
    ]
    return torch.tensor(rows)


def build_clip_l() -> tuple[nn.Module, Callable[[Tensor], list[Tensor]]]:
    network = ClipLEmbedder(CLIP_L)
    randomize(network)
    theirs = transformers_clip_l(network)
    return network, lambda ids: [theirs(ids, output_hidden_states=True).hidden_states[-2]]


def build_big_g() -> tuple[nn.Module, Callable[[Tensor], list[Tensor]]]:
    network = OpenClipEmbedder(BIG_G)
    randomize(network)
    theirs = transformers_big_g(network)

    def features(ids: Tensor) -> list[Tensor]:
        out = theirs(ids, output_hidden_states=True)
        return [out.hidden_states[-2], out.text_embeds]

    return network, features


@torch.no_grad()
@pytest.mark.parametrize(("build", "pad"), [(build_clip_l, 49407), (build_big_g, 0)], ids=["CLIP-L", "bigG"])
def test_the_text_encoders(
    build: Callable[[], tuple[nn.Module, Callable[[Tensor], list[Tensor]]]], pad: int
) -> None:
    """Two prompts, a short one and a full one."""
    network, theirs = build()
    ids = token_ids(pad)
    with measured("ours"):
        ours = network(ids)
    with measured("transformers"):
        expected = theirs(ids)
    features = [ours] if isinstance(ours, Tensor) else list(ours)
    errors = [relative(a, b) for a, b in zip(features, expected, strict=True)]
    print("features, pooled:", [f"{error:.1e}" for error in errors])
    assert max(errors) < BOUND
