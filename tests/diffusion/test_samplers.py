"""Samplers against the formulas of others, and against an equation whose solution is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from sdxl_cli.diffusion.samplers import SAMPLERS, resolve
from sdxl_cli.diffusion.samplers.base import Sampler
from sdxl_cli.diffusion.schedule import GRIDS, NoiseSchedule
from sdxl_cli.errors import UsageError

F64 = torch.float64
MEAN, WIDTH = 0.7, 0.5


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The best denoiser there is, when clean samples are normal with mean 0.7 and deviation 0.5."""
    return MEAN + (x - MEAN) * WIDTH**2 / (WIDTH**2 + sigma**2)


def exact(x: Tensor, start: float, end: float) -> Tensor:
    """Where the probability flow takes x, for the denoiser above."""
    return MEAN + (x - MEAN) * math.sqrt((WIDTH**2 + end**2) / (WIDTH**2 + start**2))


def bent(x: Tensor, sigma: float) -> Tensor:
    """A denoiser that is not linear, to compare formulas with."""
    return torch.tanh(2 * x / (1 + sigma)) + 0.1 * torch.sin(3 * x)


class NoNoise:
    """For deterministic samplers."""

    def fresh(self, x: Tensor) -> Tensor:
        raise AssertionError("deterministic samplers draw no noise")

    def between(self, x: Tensor, sigma: float, following: float) -> Tensor:
        raise AssertionError("deterministic samplers draw no noise")


def last(sampler: Sampler, denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    *_, end = sampler.steps(denoise, x, sigmas, NoNoise())
    return end


def even_in_log(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(math.log(start), math.log(end), n + 1, dtype=F64).exp()


ORDERS = {"euler": 1, "dpmpp_2m": 2}


@pytest.mark.parametrize("name", SAMPLERS)
def test_order_of_convergence(name: str) -> None:
    """Twice the steps, half the error (first order) or a quarter (second)."""
    start, end, x = 10.0, 0.1, torch.linspace(-12, 12, 9, dtype=F64)
    errors = [
        float((last(SAMPLERS[name], gaussian, x, even_in_log(start, end, n)) - exact(x, start, end)).norm())
        for n in (40, 80, 160, 320)
    ]
    orders = [math.log2(more / fewer) for more, fewer in zip(errors, errors[1:], strict=False)]
    print(f"{name}: errors {[f'{error:.1e}' for error in errors]}, orders {[f'{o:.2f}' for o in orders]}")
    assert orders[-1] == pytest.approx(ORDERS[name], abs=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_run_ends_near_where_the_flow_ends(name: str, grid: str) -> None:
    """Within half a deviation of the data in 60 steps on any grid, from pure noise."""
    schedule = NoiseSchedule()
    sigmas = GRIDS[grid](schedule, 60)
    top = float(sigmas[0])
    x = torch.linspace(-2, 2, 9, dtype=F64) * math.sqrt(1 + top**2)
    error = (last(SAMPLERS[name], gaussian, x, sigmas) - exact(x, top, 0.0)).abs().max()
    assert float(error) < WIDTH / 2


@dataclass
class TwoM:
    """DPM-Solver++(2M) in k-diffusion's terms: t = -log sigma, h of this step and the last, r = h_last / h."""

    calls: list[float] = field(default_factory=list)

    def run(self, denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float]) -> list[Tensor]:
        path, old = [], None
        for i in range(len(sigmas) - 1):
            now, following = sigmas[i], sigmas[i + 1]
            self.calls.append(now)
            denoised = denoise(x, now)
            if following == 0.0:
                x = denoised
            else:
                t, t_next = -math.log(now), -math.log(following)
                h = t_next - t
                mix = denoised
                if old is not None:
                    r = (t + math.log(sigmas[i - 1])) / h
                    mix = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
                x = math.exp(-t_next) / math.exp(-t) * x - (math.exp(-h) - 1) * mix
            old = denoised
            path.append(x)
        return path


@pytest.mark.parametrize("grid", GRIDS)
def test_dpmpp_2m_is_its_formula(grid: str) -> None:
    sigmas = GRIDS[grid](NoiseSchedule(), 17).to(F64)
    x = torch.linspace(-20, 20, 11, dtype=F64)
    expected = TwoM().run(bent, x, sigmas.tolist())
    ours = list(SAMPLERS["dpmpp_2m"].steps(bent, x, sigmas, NoNoise()))
    assert len(ours) == 17
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("grid", GRIDS)
def test_euler_is_its_formula(grid: str) -> None:
    """x' = D + (sigma' / sigma) (x - D): the noise that remains is scaled down."""
    sigmas = GRIDS[grid](NoiseSchedule(), 17).to(F64)
    x = torch.linspace(-20, 20, 11, dtype=F64)
    for now, following, ours in zip(
        sigmas.tolist(),
        sigmas.tolist()[1:],
        SAMPLERS["euler"].steps(bent, x, sigmas, NoNoise()),
        strict=False,
    ):
        denoised = bent(x, now)
        x = denoised + following / now * (x - denoised)
        assert torch.allclose(ours, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_is_the_denoised_latent(name: str) -> None:
    sigmas, x = torch.tensor([2.0, 1.0, 0.5, 0.0], dtype=F64), torch.randn(5, dtype=F64)
    *_, before, end = SAMPLERS[name].steps(bent, x, sigmas, NoNoise())
    assert torch.allclose(end, bent(before, 0.5))


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_evaluation_a_step_at_its_noise_level(name: str) -> None:
    seen = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return bent(x, sigma)

    sigmas = GRIDS["karras"](NoiseSchedule(), 9)
    assert len(list(SAMPLERS[name].steps(denoise, torch.randn(3), sigmas, NoNoise()))) == 9
    assert seen == sigmas[:-1].tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_may_stop_above_zero_and_be_gone_on_with(name: str) -> None:
    """Where a refiner takes over the sampler keeps its memory; stopping and starting anew loses it."""
    sigmas, x = GRIDS["karras"](NoiseSchedule(), 12).to(F64), torch.linspace(-20, 20, 11, dtype=F64)
    whole = list(SAMPLERS[name].steps(bent, x, sigmas, NoNoise()))
    part = list(SAMPLERS[name].steps(bent, x, sigmas[:8], NoNoise()))
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=False))
    assert len(part) == 7


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_input_is_left_as_it_was(name: str) -> None:
    x = torch.linspace(-20, 20, 11, dtype=F64)
    before = x.clone()
    path = list(SAMPLERS[name].steps(bent, x, GRIDS["sgm"](NoiseSchedule(), 5), NoNoise()))
    assert torch.equal(x, before)
    kept = [step.clone() for step in path]
    assert all(torch.equal(a, b) for a, b in zip(path, kept, strict=True))
    assert len({step.data_ptr() for step in path}) == len(path)


def test_names_are_found_and_unknown_ones_explained() -> None:
    for spelling in ("DPM++ 2M", "dpmpp-2m", "dpmpp_2m"):
        assert resolve(spelling) is SAMPLERS["dpmpp_2m"]
    assert resolve("Euler") is SAMPLERS["euler"]
    with pytest.raises(UsageError, match="euler"):
        resolve("eular")
