"""PSNR and SSIM against torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from sdxl_cli.metrics.similarity import psnr, ssim


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    """Pictures with structure, and the same with noise of three strengths; some values are beyond the range."""
    noise = torch.Generator().manual_seed(3)
    ramp = (
        torch.linspace(-1, 1, 48).expand(3, 3, 40, 48) * torch.tensor([1.0, -0.6, 0.2])[:, None, None, None]
    )
    images = (ramp + 0.1 * torch.randn(ramp.shape, generator=noise)).double()
    strengths = torch.tensor([0.02, 0.2, 0.6])[:, None, None, None]
    return images, images + strengths * torch.randn(ramp.shape, generator=noise)


def test_psnr_is_that_of_torchmetrics(pairs: tuple[Tensor, Tensor]) -> None:
    images, others = (part.clamp(-1, 1) for part in pairs)
    expected = peak_signal_noise_ratio(others, images, data_range=2.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(
        psnr(*pairs), expected, rtol=1e-7, atol=0
    )  # theirs goes through a logarithm in float32


def test_ssim_is_that_of_torchmetrics(pairs: tuple[Tensor, Tensor]) -> None:
    images, others = (part.clamp(-1, 1) / 2 + 0.5 for part in pairs)
    expected = structural_similarity_index_measure(others, images, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(*pairs), expected, rtol=0, atol=1e-9)


def test_the_same_picture_is_perfect_and_half_precision_changes_nothing_about_that() -> None:
    image = torch.rand(1, 3, 16, 16).half() * 2 - 1
    assert psnr(image, image).item() == math.inf
    assert ssim(image, image).item() == pytest.approx(1.0, abs=1e-12)


def test_what_is_not_a_number_stays_so_and_small_pictures_are_refused() -> None:
    image = torch.zeros(1, 3, 16, 16)
    assert psnr(image, image * math.nan).isnan().all()
    assert ssim(image, image * math.nan).isnan().all()
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(image[..., :10], image[..., :10])


def test_psnr_is_taken_over_the_whole_range() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 1, 3, 20, 30))
    expected = 10 * np.log10(255**2 / ((a - b) ** 2).mean())
    to_image = lambda levels: torch.tensor(levels / 127.5 - 1)  # noqa: E731
    assert psnr(to_image(a), to_image(b)).item() == pytest.approx(expected, rel=1e-9)


def test_psnr_cuts_off_what_no_picture_can_show() -> None:
    white = torch.ones(1, 3, 4, 4)
    assert psnr(white, 5 * white).item() == math.inf
