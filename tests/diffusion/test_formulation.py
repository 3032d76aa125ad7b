"""What networks predict and at which levels: zero terminal SNR against diffusers, v and x0 against its schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from sdxl_cli.diffusion.denoiser import Denoiser
from sdxl_cli.diffusion.formulation import TERMINAL_SHARE, Formulation, Prediction, zero_terminal_sigmas
from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.diffusion.schedule import BETA_END, BETA_START, sigma_table

BETAS = {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear"}
NAMES: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def test_levels_are_rescaled_as_in_diffusers_and_end_where_comfyui_ends() -> None:
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, 1000, dtype=torch.float64) ** 2
    shares = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    ours = zero_terminal_sigmas()
    assert torch.allclose(ours[:-1], ((1 - shares) / shares).sqrt()[:-1].float(), rtol=1e-5)
    assert shares[-1] == 0
    assert float(ours[-1]) == pytest.approx(4518.76, abs=0.01)
    assert ours[0] == sigma_table()[0]
    assert bool((ours.diff() > 0).all())


def test_the_table_is_that_of_comfyuis_formula() -> None:
    """ComfyUI starts from the sigmas instead of the betas; the last levels amplify their rounding."""
    roots = (1 / (sigma_table().double().square() + 1)).sqrt()
    shares = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
    shares[-1] = TERMINAL_SHARE
    assert torch.allclose(zero_terminal_sigmas().double(), (1 / shares - 1).sqrt(), rtol=1e-4)


def network(x: Tensor, index: int, crossattn: Tensor, vector: Tensor) -> Tensor:
    """Something smooth that depends on both of its inputs."""
    return torch.tanh(x * 0.7 + index / 2000) - 0.2 * x.roll(1, -1)


def walked(formulation: Formulation, sigmas: Tensor, noise: Tensor) -> list[Tensor]:
    nothing = torch.zeros(len(noise), 1, 1), torch.zeros(len(noise), 1)
    denoiser = Denoiser(network, formulation.schedule(), formulation.prediction)
    start = noise * (1 + sigmas[0] ** 2).sqrt()
    steps = SAMPLERS["euler"].steps(
        lambda x, sigma: denoiser(x, sigma, *nothing), start, sigmas, NoiseStreams([0])
    )
    return list(steps)


def their_walk(scheduler: Any, start: Tensor, n: int) -> list[Tensor]:
    scheduler.set_timesteps(n)
    x, path = start, []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(scaled, t[None], x, x), t, x).prev_sample
        path.append(x)
    return path


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("prediction", "zero"), [("v", False), ("v", True), ("x0", False), ("x0", True)])
def test_every_step_of_eulers_method(prediction: Prediction, zero: bool) -> None:
    """diffusers stops at ᾱ = 2^-24, sigma 4096; with our last level in its place the walks are the same."""
    scheduler: Any = diffusers.EulerDiscreteScheduler(
        **BETAS, prediction_type=NAMES[prediction], timestep_spacing="trailing", rescale_betas_zero_snr=zero
    )
    if zero:
        scheduler.alphas_cumprod[-1] = TERMINAL_SHARE
    formulation, noise = Formulation(prediction, zero), torch.randn(2, 4, 6, 6)
    sigmas = GRIDS["trailing"](formulation.schedule(), 8)
    theirs = their_walk(scheduler, noise * (1 + sigmas[0] ** 2).sqrt(), 8)
    for ours, other, level in zip(walked(formulation, sigmas, noise), theirs, sigmas[1:], strict=True):
        # in the units of the network's input; the step from 4518 loses four digits in single precision
        scale = 1 / (1 + level**2).sqrt()
        assert float((ours - other).abs().max() * scale) < (3e-4 if zero else 3e-5)


def test_ddim_from_exactly_zero_signal_gives_the_same() -> None:
    """diffusers' DDIM has ᾱ = 0 where we have 5e-8: sqrt of that is the largest difference there can be."""
    scheduler: Any = diffusers.DDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    formulation, noise = Formulation("v", True), torch.randn(2, 4, 6, 6)
    ours = walked(formulation, GRIDS["trailing"](formulation.schedule(), 10), noise)
    theirs = their_walk(scheduler, noise, 10)
    assert float((ours[-1] - theirs[-1]).abs().max()) < 5 * TERMINAL_SHARE**0.5
    ordinary = Formulation("v", False)
    other = walked(ordinary, GRIDS["trailing"](ordinary.schedule(), 10), noise)
    assert float((other[-1] - theirs[-1]).abs().max()) > 1e-2, "the rescaling must matter"


def test_x0_at_one_step_is_the_output_itself() -> None:
    """One-step SDXL-Lightning: the picture is what the network says of pure noise."""
    formulation, noise = Formulation("x0"), torch.randn(1, 4, 6, 6)
    (made,) = walked(formulation, GRIDS["trailing"](formulation.schedule(), 1), noise)
    assert torch.allclose(made, network(noise, torch.tensor([999]), noise, noise), atol=1e-5)
