"""Denoiser and guidance, against the formulas they stand for, with a network that only takes notes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_cli.diffusion.denoiser import Denoiser, to_denoised
from sdxl_cli.diffusion.formulation import Prediction
from sdxl_cli.diffusion.guidance import Guidance, Guided
from sdxl_cli.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()


class Notes:
    """A network that predicts what it is told, and writes down what it was given."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, *inputs: Any) -> Tensor:
        self.given.append(inputs)
        return self.answer


def text(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 5, 6).to(dtype), torch.randn(batch, 7).to(dtype)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("index", [0, 1, 500, 999])
def test_scalings(prediction: Prediction, index: int) -> None:
    """c_in, c_skip and c_out in double precision, from the definition of what is predicted."""
    sigma = float(SCHEDULE.sigmas[index])
    x, answer = torch.randn(3, 4, 5, 6) * sigma, torch.randn(3, 4, 5, 6)
    network, crossattn_vector = Notes(answer), text(3)
    denoised = Denoiser(network, SCHEDULE, prediction)(x, sigma, *crossattn_vector)
    scaled, timestep, *rest = network.given[0]
    alpha = 1 / math.sqrt(1 + sigma**2)
    noise_share = sigma * alpha
    assert torch.allclose(scaled, (x.double() * alpha).float(), rtol=1e-5)
    assert timestep == index
    assert all(given is meant for given, meant in zip(rest, crossattn_vector, strict=True))
    # variance preserving: z = alpha x0 + noise_share eps, and v = alpha eps - noise_share x0
    z = x.double() * alpha
    formulas = {"eps": (z - noise_share * answer) / alpha, "v": alpha * z - noise_share * answer}
    expected = formulas[prediction]
    assert denoised.dtype == torch.float32
    assert torch.allclose(denoised.double(), expected, rtol=1e-5, atol=1e-5 * max(1, sigma))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_right_prediction_gives_the_clean_latent(prediction: Prediction) -> None:
    clean, eps = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for sigma in (0.03, 1.0, 14.6):
        root = math.sqrt(1 + sigma**2)
        output = eps if prediction == "eps" else (eps - sigma * clean) / root
        level = torch.tensor(sigma, dtype=torch.float64)
        assert torch.allclose(to_denoised(prediction, output, clean + sigma * eps, level), clean)


def test_a_level_between_two_is_the_nearest_to_the_network_and_in_the_scalings() -> None:
    """sgm's DiscreteDenoiser: quantised before scaling, the lower on a tie."""
    low, high = (float(SCHEDULE.sigmas[i]) for i in (700, 701))
    x, answer = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    for sigma, index in ((0.75 * low + 0.25 * high, 700), (0.25 * low + 0.75 * high, 701), (99.0, 999)):
        network = Notes(answer)
        denoised = Denoiser(network, SCHEDULE)(x, sigma, *text(1))
        level = float(SCHEDULE.sigmas[index])
        assert network.given[0][1] == index
        assert torch.allclose(denoised, x - level * answer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_network_computes_in_its_precision_and_the_rest_in_single(dtype: torch.dtype) -> None:
    x, answer = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3).to(dtype)
    network = Notes(answer)
    denoised = Denoiser(network, SCHEDULE)(x, float(SCHEDULE.sigmas[300]), *text(2, dtype))
    assert network.given[0][0].dtype == dtype
    assert denoised.dtype == torch.float32
    assert torch.equal(denoised, x - SCHEDULE.sigmas[300] * answer.float())


class Told:
    """D(x) is the mean of the conditions: which side a sample is on can be read off."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, index: int, crossattn: Tensor, vector: Tensor) -> Tensor:
        self.batches.append(len(vector))
        both = crossattn.mean((1, 2)) + vector.mean(1)
        return both[:, None, None, None].expand(-1, *x.shape[1:])


def sides(batch: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    (negative, negative_vector), (positive, positive_vector) = text(batch), text(batch)
    return (negative, positive), (negative_vector, positive_vector)


@pytest.mark.parametrize("scale", [0.5, 5.0, 12.0])
def test_guidance_goes_beyond_the_positive_side(scale: float) -> None:
    network, x = Told(), torch.randn(3, 4, 2, 2)
    denoiser = Denoiser(network, SCHEDULE)
    crossattn, vector = sides(3)
    sigma = float(SCHEDULE.sigmas[420])
    guided = Guided(denoiser, crossattn, vector, Guidance(scale))(x, sigma)
    negative, positive = (denoiser(x, sigma, c, v) for c, v in zip(crossattn, vector, strict=True))
    assert network.batches == [6, 3, 3]
    expected = (1 - scale) * negative.double() + scale * positive.double()
    assert torch.allclose(guided.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_negative_side_comes_first_and_both_read_the_same_latents() -> None:
    """The order is the original's: it matters where kernels depend on the place in the batch."""
    network = Notes(torch.zeros(4, 4, 2, 2))
    crossattn, vector = sides(2)
    guided = Guided(Denoiser(network, SCHEDULE), crossattn, vector, Guidance(5.0))
    for _ in range(2):
        guided(torch.randn(2, 4, 2, 2), 1.0)
    x, _, given, given_vector = network.given[0]
    assert len(x) == 2
    assert given is network.given[1][2], "a network may remember what it made of it"
    assert given_vector is network.given[1][3]
    assert torch.equal(given, torch.cat(crossattn))
    assert torch.equal(given_vector, torch.cat(vector))


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_no_guidance_does_not_compute_the_negative_side(scale: float) -> None:
    """Model cards for diffusers say 0 where others say 1; diffusers guides only above 1."""
    network, x = Told(), torch.randn(3, 4, 2, 2)
    crossattn, vector = sides(3)
    denoiser = Denoiser(network, SCHEDULE)
    guided = Guided(denoiser, crossattn, vector, Guidance(scale))(x, 1.0)
    assert network.batches == [3]
    assert torch.equal(guided, denoiser(x, 1.0, crossattn[1], vector[1]))
