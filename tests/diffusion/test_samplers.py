"""Samplers against k-diffusion and diffusers, and against a flow whose end is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.diffusion.samplers.base import Sampler
from sdxl_cli.diffusion.schedule import NoiseSchedule
from tests.diffusion.mixture import even_in_log, order_of, slow_start
from tests.diffusion.peers import (
    DIFFUSERS,
    K_NAMES,
    SCHEDULE,
    Denoise,
    NoNoise,
    Tape,
    diffusers_path,
    k_path,
)

F64 = torch.float64
MEAN, WIDTH = 0.7, 0.5
X = torch.linspace(-20, 20, 22, dtype=F64).reshape(2, 11)


def without_noise(name: str) -> Sampler:
    sampler = SAMPLERS[name]
    return replace(sampler, eta=0.0) if hasattr(sampler, "eta") else sampler


ON_THE_FLOW = [name for name in SAMPLERS if name != "lcm"]


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The best denoiser there is, when clean samples are normal with mean 0.7 and deviation 0.5."""
    return MEAN + (x - MEAN) * WIDTH**2 / (WIDTH**2 + sigma**2)


def bent(x: Tensor, sigma: float) -> Tensor:
    """A denoiser that is not linear, to compare formulas with."""
    return torch.tanh(2 * x / (1 + sigma)) + 0.1 * torch.sin(3 * x)


def last(sampler: Sampler, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Any = None) -> Tensor:
    *_, end = sampler.steps(denoise, x, sigmas, noise or NoNoise())
    return end


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "euler_a": [{"eta": 0.6, "s_noise": 0.9}],
    "lms": [{"order": 3}],
    "dpm2_a": [{"eta": 0.6, "s_noise": 0.9}],
    "dpmpp_2s_a": [{"eta": 0.6, "s_noise": 0.9}],
    "dpmpp_2m_sde": [{"eta": 0.6, "s_noise": 0.9}, {"eta": 0.0}],
    "dpmpp_2m_sde_heun": [{"eta": 0.6}],
    "dpmpp_3m_sde": [{"eta": 0.6, "s_noise": 0.9}, {"eta": 0.0}],
    "dpmpp_sde": [{"eta": 0.6, "s_noise": 0.9, "r": 0.3}, {"eta": 0.0}],
}


@pytest.mark.parametrize("name", K_NAMES)
@pytest.mark.parametrize("grid", ["karras", "sgm"])
def test_every_step_is_k_diffusions(name: str, grid: str) -> None:
    """On a whole run to 0, one from below the top, and one that is left above 0; with other options too."""
    whole = GRIDS[grid](SCHEDULE, 9).to(F64)
    for sigmas in (whole, whole[3:], whole[:6]):
        for options in ({}, *OPTIONS.get(name, [])):
            given = {"solver_order" if key == "order" else key: value for key, value in options.items()}
            ours = list(replace(SAMPLERS[name], **given).steps(bent, X, sigmas, Tape()))
            assert worst(ours, k_path(name, bent, X, sigmas, Tape(), **options)) < 1e-12


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2"])
def test_churn_is_k_diffusions(name: str) -> None:
    sigmas = GRIDS["karras"](SCHEDULE, 9).to(F64)
    for churn in (1.5, 40.0):
        ours = last(replace(SAMPLERS[name], s_churn=churn, s_noise=1.01), bent, X, sigmas, Tape())
        theirs = k_path(name, bent, X, sigmas, Tape(), s_churn=churn, s_noise=1.01)[-1]
        assert float((ours - theirs).abs().max()) < 1e-12


def test_churn_keeps_to_its_levels() -> None:
    """Without a step in them there is none, whatever its strength."""
    sigmas = GRIDS["karras"](SCHEDULE, 9).to(F64)
    calm = last(SAMPLERS["euler"], bent, X, sigmas)
    assert torch.equal(last(replace(SAMPLERS["euler"], s_churn=40.0, s_tmin=20.0), bent, X, sigmas), calm)
    assert torch.equal(last(replace(SAMPLERS["euler"], s_churn=40.0, s_tmax=0.01), bent, X, sigmas), calm)
    tape = Tape()
    last(replace(SAMPLERS["euler"], s_churn=40.0, s_tmin=1.0, s_tmax=10.0), bent, X, sigmas, tape)
    assert tape.draws == int(((sigmas >= 1) & (sigmas <= 10)).sum())


THEIR_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ddim": [{"eta": 0.0}, {"eta": 0.7}, {"eta": 1.0}],
    "unipc": [{"solver_order": o, "solver_type": t} for o in (1, 2, 3) for t in ("bh1", "bh2")],
    "deis": [{"solver_order": order} for order in (1, 2, 3)],
    "tcd": [{"eta": eta} for eta in (0.0, 0.3, 0.5, 1.0)],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", DIFFUSERS)
def test_every_step_is_diffusers(name: str) -> None:
    """Up to single precision, where their classes compute in it."""
    sigmas = GRIDS["lcm" if name in ("lcm", "tcd") else "trailing"](SCHEDULE, 10).to(F64)
    if name == "deis":
        # theirs does not go to 0
        sigmas = sigmas[:-1]
    for options in THEIR_OPTIONS.get(name, [{}]):
        ours = list(replace(SAMPLERS[name], **options).steps(bent, X, sigmas, Tape()))
        theirs = diffusers_path(name, bent, X, sigmas, Tape(), **options)
        if name == "tcd":
            # theirs ends at the lowest level of the table
            ours, theirs = ours[:-1], theirs[:-1]
        error = worst(ours, theirs)
        print(f"{name} {options}: {error:.1e}")
        assert error < (
            1e-6 if name in ("euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m") else 1e-9
        )


@pytest.mark.parametrize("name", ON_THE_FLOW)
def test_order_of_convergence(name: str) -> None:
    """To where the flow of a mixture of three Gaussians ends: twice the steps, an error 2^order smaller."""
    sampler = without_noise(name)
    # the first steps of these know too little of the past for their order, so they are short
    grid = slow_start if name in ("lms", "dpmpp_3m", "dpmpp_3m_sde") else even_in_log
    assert order_of(sampler, grid) == pytest.approx(sampler.order, abs=0.15)


@pytest.mark.parametrize(("name", "order"), [("deis", 1), ("deis", 3), ("lms", 1), ("lms", 2), ("lms", 3)])
def test_order_is_what_is_asked_for(name: str, order: int) -> None:
    assert order_of(replace(SAMPLERS[name], solver_order=order), slow_start) == pytest.approx(order, abs=0.15)


def test_the_corrector_of_unipc_adds_an_order() -> None:
    for order in (1, 2, 3):
        found = order_of(replace(SAMPLERS["unipc"], solver_order=order), slow_start)
        assert found == pytest.approx(order + 1, abs=0.3)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_run_ends_near_where_the_flow_ends(name: str, grid: str) -> None:
    """Within half a deviation of the data in 50 steps on any grid, from pure noise."""
    sigmas = GRIDS[grid](NoiseSchedule(), 50)
    top = float(sigmas[0])
    x = torch.linspace(-2, 2, 9, dtype=F64) * math.sqrt(1 + top**2)
    end = MEAN + (x - MEAN) * WIDTH / math.sqrt(WIDTH**2 + top**2)
    if name == "lcm":
        # it does not follow the flow: what stays is that it ends at a denoised latent
        assert torch.isfinite(last(SAMPLERS[name], gaussian, x[None], sigmas, NoiseStreams([1]))).all()
        return
    assert float((last(without_noise(name), gaussian, x, sigmas) - end).abs().max()) < WIDTH / 2


COUNT = 50_000
"""Samples: a variance is known to 0.63 %."""


def spread(name: str, sigmas: Tensor) -> float:
    """Variance after a run of a sampler of the given name, on Gaussian data from noise alone, in COUNT samples."""
    top = float(sigmas[0])
    x = torch.randn(1, COUNT, generator=torch.Generator().manual_seed(0)) * math.sqrt(WIDTH**2 + top**2)
    x = last(SAMPLERS[name], gaussian, MEAN + x, sigmas, NoiseStreams([7]))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    return float(x.var())


@pytest.mark.parametrize(
    "name", ["dpm2_a", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "dpmpp_sde", "dpmpp_2s_a"]
)
def test_added_noise_leaves_the_right_spread(name: str) -> None:
    """At level 0.4, that of the data with that noise: second-order samplers are there in 60 steps."""
    found, end = spread(name, even_in_log(14.6, 0.4, 60)), WIDTH**2 + 0.4**2
    print(f"{name}: variance {found:.4f} for {end:.4f}")
    assert found == pytest.approx(end, rel=0.025)


@pytest.mark.parametrize("name", ["euler_a", "ddpm", "lcm", "tcd"])
def test_first_order_samplers_have_the_spread_that_their_formula_says(name: str) -> None:
    """D is linear here, so a variance can be followed exactly: down to a level, and up by noise."""
    sigmas = GRIDS["sgm"](SCHEDULE, 12)[:-1]
    variance = WIDTH**2 + float(sigmas[0]) ** 2
    for sigma, following in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        downs = {
            "lcm": 0.0,
            "tcd": float(SCHEDULE.sigmas[math.floor(0.7 * SCHEDULE.index_of(following))]),
            # DDPM's posterior variance is following² (1 - following² / sigma²); what is left is this
            "euler_a": following**2 / sigma,
            "ddpm": following**2 / sigma,
        }
        down = downs[name]
        pull = WIDTH**2 / (WIDTH**2 + sigma**2)
        variance *= (pull + down / sigma * (1 - pull)) ** 2
        variance += following**2 - down**2
    assert spread(name, sigmas) == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    """Alone, in another batch, at another place in it: bit by bit the same."""
    sigmas = GRIDS["karras"](SCHEDULE, 8)

    def run(seeds: list[int]) -> Tensor:
        streams = NoiseStreams(seeds)
        return last(SAMPLERS[name], bent, streams.next((4, 6, 5)) * sigmas[0], sigmas, streams)

    together, alone = run([3, 9, 4]), run([9])
    assert torch.equal(together[1], alone[0])
    assert torch.equal(run([9, 1])[0], alone[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_is_the_denoised_latent(name: str) -> None:
    if name == "lms":
        return  # extrapolates to 0 as to any level
    sigmas, x = torch.tensor([2.0, 1.0, 0.5, 0.0], dtype=F64), torch.randn(1, 5, dtype=F64)
    seen: list[tuple[Tensor, float]] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        seen.append((bent(x, sigma), sigma))
        return seen[-1][0]

    end = last(SAMPLERS[name], denoise, x, sigmas, NoiseStreams([1]))
    assert seen[-1][1] == 0.5
    assert torch.allclose(end, seen[-1][0], rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_as_many_as_said(name: str) -> None:
    sampler, seen = SAMPLERS[name], []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return bent(x, sigma)

    sigmas = GRIDS["karras"](NoiseSchedule(), 9)
    assert len(list(sampler.steps(denoise, torch.randn(1, 3), sigmas, NoiseStreams([1])))) == 9
    assert len(seen) == 9 * sampler.evaluations - (sampler.evaluations - 1)
    if sampler.evaluations == 1:
        assert seen == sigmas[:-1].tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_may_stop_above_zero_and_be_gone_on_with(name: str) -> None:
    """A run that ends early is the beginning of the whole one: nothing looks ahead to the end."""
    sigmas, x = GRIDS["karras"](NoiseSchedule(), 12).to(F64), X
    whole = list(SAMPLERS[name].steps(bent, x, sigmas, NoiseStreams([1, 2])))
    part = list(SAMPLERS[name].steps(bent, x, sigmas[:8], NoiseStreams([1, 2])))
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=False))
    assert len(part) == 7


@pytest.mark.parametrize("name", ["lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "deis"])
def test_what_a_sampler_remembers_matters(name: str) -> None:
    """Begun anew in the middle it goes another way: why the walk is kept when a refiner takes over."""
    sigmas, noise = GRIDS["karras"](NoiseSchedule(), 12).to(F64), NoiseStreams([1, 2])
    whole = list(SAMPLERS[name].steps(bent, X, sigmas, noise))
    anew = list(SAMPLERS[name].steps(bent, whole[5], sigmas[6:], noise))
    assert not torch.allclose(anew[-2], whole[-2], rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_and_two_are_enough_to_run(name: str) -> None:
    for sigmas in ([14.6, 0.0], [14.6, 1.0], [3.0, 1.0, 0.0]):
        end = last(SAMPLERS[name], bent, X, torch.tensor(sigmas, dtype=F64), NoiseStreams([1, 2]))
        assert torch.isfinite(end).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_input_is_left_as_it_was(name: str) -> None:
    before = X.clone()
    path = list(SAMPLERS[name].steps(bent, X, GRIDS["sgm"](NoiseSchedule(), 5), NoiseStreams([1, 2])))
    assert torch.equal(X, before)
    kept = [step.clone() for step in path]
    assert all(torch.equal(a, b) for a, b in zip(path, kept, strict=True))
    assert len({step.data_ptr() for step in path}) == len(path)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scheduler", ["sgm", "karras"])
def test_where_a_sampler_will_look_is_known_beforehand(name: str, scheduler: str) -> None:
    """To the last bit, whatever the pictures are."""
    sampler = SAMPLERS[name]
    if hasattr(sampler, "s_churn"):
        sampler = replace(sampler, s_churn=2.0)
    sigmas = GRIDS[scheduler](NoiseSchedule(), 7)
    looked = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        looked.append(sigma)
        return bent(x, sigma)

    list(sampler.steps(denoise, torch.randn(2, 4, 3, 3), sigmas, NoiseStreams([1, 2])))
    assert sampler.levels(sigmas) == looked
    assert len(looked) >= 7
