"""Guidance that is not the same at all noise levels, and its contrast."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from torch import Tensor

from sdxl_cli.diffusion.denoiser import Denoiser
from sdxl_cli.diffusion.formulation import Prediction
from sdxl_cli.diffusion.guidance import Emphasis, Guidance, Guided, rescaled
from sdxl_cli.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_the_contrast_is_taken_back_as_in_diffusers(phi: float) -> None:
    positive = torch.randn(3, 4, 8, 8) * torch.tensor([0.5, 1.0, 3.0]).view(3, 1, 1, 1)
    guided = 5 * positive + torch.randn(3, 4, 8, 8)
    assert torch.allclose(
        rescaled(guided, positive, phi), rescale_noise_cfg(guided, positive, phi), rtol=1e-5
    )
    full = rescaled(guided, positive, 1.0)
    assert torch.allclose(full.std(dim=(1, 2, 3)), positive.std(dim=(1, 2, 3)))


class Counting:
    """Says the mean of the conditions plus the input, and remembers how many pictures it was given each time."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.vectors: list[Tensor] = []

    def __call__(self, x: Tensor, index: int, crossattn: Tensor, vector: Tensor) -> Tensor:
        self.batches.append(len(vector))
        self.vectors.append(vector)
        x = x.repeat(len(vector) // len(x), 1, 1, 1)
        return x * crossattn.mean((1, 2))[:, None, None, None] + 0.1 * vector.mean(1)[:, None, None, None]


def guided(network: Counting, guidance: Guidance, prediction: Prediction = "eps") -> Guided:
    torch.manual_seed(0)
    crossattn, vector = ((torch.randn(2, *shape), torch.randn(2, *shape)) for shape in ((7, 6), (5,)))
    return Guided(Denoiser(network, SCHEDULE, prediction), crossattn, vector, guidance)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_rescaling_is_of_the_networks_output_not_of_the_picture(prediction: Prediction) -> None:
    network, x, sigma = Counting(), torch.randn(2, 4, 5, 5), float(SCHEDULE.sigmas[600])
    guide = guided(network, Guidance(5.0, rescale=0.7), prediction)
    sides = [guide.denoiser.predict(x, sigma, guide.crossattn[i], guide.vector[i]) for i in (0, 1)]
    expected = rescale_noise_cfg(sides[0] + 5.0 * (sides[1] - sides[0]), sides[1], 0.7)
    assert torch.allclose(guide(x, sigma), guide.denoiser.denoised(expected, x, sigma), rtol=1e-4, atol=1e-4)


def test_outside_the_interval_the_negative_side_is_not_computed() -> None:
    """lo < sigma <= hi (arXiv 2404.07724): with 2 pictures 4 rows inside, 2 outside."""
    network, x = Counting(), torch.randn(2, 4, 5, 5)
    guide = guided(network, Guidance(5.0, interval=(0.28, 5.42)))
    for sigma in (14.0, 5.43, 5.42, 1.0, 0.281, 0.28, 0.05):
        denoised = guide(x, sigma)
        if not 0.28 < sigma <= 5.42:
            assert torch.equal(denoised, guide.denoiser(x, sigma, guide.crossattn[1], guide.vector[1]))
            network.batches.pop()
    assert network.batches == [2, 2, 4, 4, 4, 2, 2]


def test_a_curve_goes_through_its_points_and_is_linear_in_log_sigma_between() -> None:
    guidance = Guidance(99.0, curve=((8.0, 7.0), (2.0, 3.0), (0.5, 1.0)))
    for sigma, scale in ((8.0, 7.0), (2.0, 3.0), (0.5, 1.0), (20.0, 7.0), (0.1, 1.0), (4.0, 5.0), (1.0, 2.0)):
        assert guidance.scale_at(sigma) == pytest.approx(scale, abs=1e-12)
    assert Guidance(5.0, curve=((8.0, 7.0),)).scale_at(1.0) == 7.0
    assert Guidance(5.0, interval=(0.0, math.inf)).scale_at(1e-6) == 5.0


def test_the_emphasis_is_used_above_its_noise_level_only() -> None:
    network, x = Counting(), torch.randn(2, 4, 5, 5)
    plain = guided(network, Guidance(5.0))
    other = (torch.full((2, 5), 2.0), torch.full((2, 5), 3.0))
    guide = Guided(plain.denoiser, plain.crossattn, plain.vector, plain.guidance, Emphasis(other, above=4.0))
    for sigma in (4.01, 4.0):
        guide(x, sigma)
    assert torch.equal(network.vectors[0], torch.cat(other))
    assert torch.equal(network.vectors[1], torch.cat(plain.vector))


def test_what_the_network_will_be_given_is_what_it_is_given() -> None:
    """The very same tensors, each with the timesteps at which it comes, and each timestep once."""
    network, x = Counting(), torch.randn(2, 4, 5, 5)
    made = guided(network, Guidance(5.0, interval=(0.28, 5.42)))
    early = (torch.randn(2, 5), torch.randn(2, 5))
    made = replace(made, emphasis=Emphasis(early, above=2.0))
    levels = [14.0, 5.0, 3.0, 3.0001, 1.0, 0.5, 0.1]
    expected: dict[int, set[int]] = {}
    for level in levels:
        made(x, level)
        expected.setdefault(id(network.vectors[-1]), set()).add(SCHEDULE.index_of(level))
    needs = list(made.needs(levels))
    assert {id(vector): set(indices) for _, vector, indices in needs} == expected
    assert all(len(indices) == len(set(indices)) for _, _, indices in needs)
    assert [len(vector) for _, vector, _ in needs] == [2, 4, 4, 2]
