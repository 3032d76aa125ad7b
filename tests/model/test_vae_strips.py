"""The autoencoder strip by strip: what comes out is what comes out of the whole, in less memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sdxl_kernels import strips
from torch import Tensor

from sdxl_cli.generation.memory import STRIPS_WORK, decoding_bytes
from sdxl_cli.model import vae_strips
from sdxl_cli.model.config import BASE as RELEASED
from sdxl_cli.model.config import VAEConfig
from sdxl_cli.model.live_bytes import LiveBytes
from sdxl_cli.model.vae import Autoencoder
from tests.model.peers import randomize, relative

CONFIG = VAEConfig(channels=32, channel_mult=(1, 2, 4), norm_groups=8)
GIB = 1 << 30
BOUND = {False: 1e-5, True: 3e-5}
"""Of the difference, relative to the whole; with Winograd's convolutions, whose sums are rounded otherwise."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    torch.manual_seed(0)
    found = Autoencoder(CONFIG)
    randomize(found)
    return found.requires_grad_(False)


def in_small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many seams, none of them where another layer has one."""
    monkeypatch.setattr(strips, "STRIP", 1 << 13)
    monkeypatch.setattr(strips, "TRANSFORMED", 1 << 12)
    monkeypatch.setattr(strips, "FEWEST_TILES", 1)
    monkeypatch.setattr(strips, "STATISTICS", 1 << 10)


@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.parametrize("size", [(24, 24), (17, 30)])
def test_decoding_has_no_seams(
    vae: Autoencoder, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], winograd: bool
) -> None:
    in_small_strips(monkeypatch)
    z = torch.randn(2, 4, *size)
    expected = vae.decode(z)
    made = vae_strips.decode(vae, z, winograd=winograd)
    assert made.shape == expected.shape
    assert relative(made, expected) < BOUND[winograd]
    # per row: a seam would be one, or two, far above the rest
    errors = (made - expected).square().mean(dim=(0, 1, 3)).sqrt()
    assert errors.max() < 3 * errors.median()


@pytest.mark.parametrize("winograd", [False, True])
def test_encoding_too(vae: Autoencoder, monkeypatch: pytest.MonkeyPatch, winograd: bool) -> None:
    in_small_strips(monkeypatch)
    image = torch.rand(2, 3, 72, 100) * 2 - 1
    expected, made = vae.encode(image), vae_strips.encode(vae, image, winograd=winograd)
    assert relative(made.mean, expected.mean) < BOUND[winograd]
    assert relative(made.logvar, expected.logvar) < BOUND[winograd]


def test_in_double_precision_nothing_is_left_of_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_strips(monkeypatch)
    torch.manual_seed(1)
    double = Autoencoder(CONFIG).double()
    z = torch.randn(1, 4, 20, 20, dtype=torch.float64)
    expected = double.decode(z)
    for winograd in (False, True):
        assert (vae_strips.decode(double, z, winograd=winograd) - expected).abs().max() < 1e-11


def peak(dtype: torch.dtype, side: int, *, whole: bool = False) -> int:
    with torch.device("meta"):
        vae = Autoencoder(RELEASED.vae).to(dtype)
        latent = torch.empty(1, 4, side // 8, side // 8, dtype=dtype)
        with LiveBytes() as seen:
            _ = vae.decode(latent) if whole else vae_strips.decode(vae, latent, winograd=True)
    return seen.peak


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2.0), (torch.bfloat16, 1.0)])
def test_peaks_of_the_released_size(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bound: float
) -> None:
    """Counted from shapes: at 1024², and that what is told beforehand is neither too little nor far too much."""
    monkeypatch.setattr(strips, "STATISTICS", 1 << 24)  # fewer operations to count
    found = peak(dtype, 1024)
    assert found < bound * GIB
    told = decoding_bytes(RELEASED, (1024, 1024), dtype)
    assert found <= told < found + 2 * STRIPS_WORK
    assert peak(dtype, 1024, whole=True) > 1.4 * found


def test_a_picture_of_2048_pixels_a_side_takes_less_than_8_gigabytes() -> None:
    torch_itself = 600 * 10**6
    weights = sum(p.numel() * 4 for p in _released().parameters())
    assert decoding_bytes(RELEASED, (2048, 2048), torch.float32) + weights + torch_itself < 8 * 10**9


def _released() -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(RELEASED.vae)


def test_latents_and_images_are_not_written_to(vae: Autoencoder) -> None:
    z, image = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 32, 32)
    kept: list[Tensor] = [z.clone(), image.clone()]
    vae_strips.decode(vae, z)
    vae_strips.encode(vae, image)
    assert torch.equal(z, kept[0])
    assert torch.equal(image, kept[1])
