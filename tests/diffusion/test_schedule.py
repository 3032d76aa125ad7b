"""Noise levels and grids, against numpy and against diffusers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdxl_cli.diffusion import schedule
from sdxl_cli.diffusion.schedule import GRIDS, NoiseSchedule, sigma_table
from sdxl_cli.errors import UsageError

SCHEDULE = NoiseSchedule()
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def exact_sigmas() -> np.ndarray:
    """From the definition, in double precision."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    alphas = np.cumprod(1 - betas)
    return np.sqrt((1 - alphas) / alphas)


def theirs(**settings: Any) -> Any:
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings
    )


def test_the_table_is_that_of_the_definition() -> None:
    """Betas in single precision would be off by 1e-5; what single precision can hold is 1.2e-7."""
    table = sigma_table()
    assert (table.dtype, table.shape) == (torch.float32, (1000,))
    error = np.abs(table.double().numpy() / exact_sigmas() - 1).max()
    single = theirs().sigmas[:-1].flip(0)
    off = np.abs(single.double().numpy() / exact_sigmas() - 1).max()
    print(f"sigma table: {error:.1e}; diffusers', in single precision: {off:.1e}")
    assert error < 1.3e-7
    assert 1e-6 < off < 2e-5


def test_known_values() -> None:
    """Those of the released model; below the 200th the refiner was trained."""
    table = SCHEDULE.sigmas
    for index, value in ((0, 0.0291672), (199, 0.5692849), (999, 14.6146412)):
        assert float(table[index]) == pytest.approx(value, rel=2e-6)
    assert (SCHEDULE.sigma_min, SCHEDULE.sigma_max) == (float(table[0]), float(table[-1]))
    assert (table.diff() > 0).all()


def test_sgm_grid_is_the_originals_for_every_number_of_steps() -> None:
    table = SCHEDULE.sigmas
    for n in range(1, 1001):
        indices = np.linspace(999, 0, n, endpoint=False).astype(int)
        assert torch.equal(schedule.sgm(SCHEDULE, n)[:-1], table[torch.from_numpy(indices)]), n
    ten = [SCHEDULE.index_of(sigma) for sigma in schedule.sgm(SCHEDULE, 10)[:-1].tolist()]
    assert ten == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 30, 50, 999, 1000])
def test_every_grid_descends_from_the_top_to_zero(name: str, n: int) -> None:
    sigmas = GRIDS[name](SCHEDULE, n)
    assert (sigmas.dtype, sigmas.shape) == (torch.float32, (n + 1,))
    assert float(sigmas[-1]) == 0.0
    assert (sigmas.diff() < 0).all()
    assert float(sigmas[0]) <= SCHEDULE.sigma_max * (1 + 1e-6)
    if name != "leading":
        assert float(sigmas[0]) == pytest.approx(SCHEDULE.sigma_max, rel=1e-6)


def indices(sigmas: torch.Tensor) -> list[int]:
    return [SCHEDULE.index_of(sigma) for sigma in sigmas[:-1].tolist()]


@pytest.mark.parametrize(("name", "offset"), [("trailing", 0), ("leading", 1)])
def test_diffusers_spacings(name: str, offset: int) -> None:
    """The same timesteps, and their sigmas up to the single precision of their table.

    Multiples of 16 are where 1000 / n ends in a half, which has to be rounded alike.
    """
    scheduler = theirs(timestep_spacing=name, steps_offset=offset)
    for n in {*range(1, 101), *range(16, 1000, 16), 999}:
        scheduler.set_timesteps(n)
        # their arange may overshoot by one step, below timestep 0
        expected = scheduler.timesteps.long().tolist()[:n]
        sigmas = GRIDS[name](SCHEDULE, n)
        assert indices(sigmas) == expected, n
        assert torch.allclose(sigmas[:-1], scheduler.sigmas[:n], rtol=2e-5)


def test_a_thousand_steps_are_the_whole_table() -> None:
    """diffusers' leading would ask for timestep 1000; a level may not come twice."""
    whole = torch.cat([SCHEDULE.sigmas.flip(0), torch.zeros(1)])
    for name in ("sgm", "trailing", "leading"):
        assert torch.equal(GRIDS[name](SCHEDULE, 1000), whole)
    assert torch.allclose(GRIDS["normal"](SCHEDULE, 1000), whole, rtol=1e-6)


def test_known_timesteps_of_thirty_steps() -> None:
    """What the released scheduler_config gives, and what the original gives."""
    assert indices(GRIDS["leading"](SCHEDULE, 30))[:3] == [958, 925, 892]
    assert indices(GRIDS["leading"](SCHEDULE, 30))[-1] == 1
    assert indices(GRIDS["sgm"](SCHEDULE, 30))[:2] == [999, 965]
    assert indices(GRIDS["sgm"](SCHEDULE, 30))[-1] == 33


def test_trailing_is_the_originals_grid_where_it_divides() -> None:
    for n in (d for d in range(1, 1001) if 1000 % d == 0):
        assert torch.equal(GRIDS["trailing"](SCHEDULE, n), GRIDS["sgm"](SCHEDULE, n))


def test_normal_is_even_in_timesteps() -> None:
    """As diffusers' linspace where timesteps are whole numbers; between them linear in log sigma, as k-diffusion."""
    scheduler = theirs(timestep_spacing="linspace")
    for n in (2, 4, 10, 28, 38, 112, 334, 1000):
        scheduler.set_timesteps(n)
        assert torch.allclose(GRIDS["normal"](SCHEDULE, n), scheduler.sigmas, rtol=2e-5)
    logs = np.log(exact_sigmas())
    for n in (3, 5, 20, 30, 777):
        expected = np.exp(np.interp(np.linspace(999, 0, n), np.arange(1000), logs))
        ours = GRIDS["normal"](SCHEDULE, n)[:-1]
        assert np.abs(ours.double().numpy() / expected - 1).max() < 1e-6


def test_sgm_uniform_is_the_originals_grid_before_truncation() -> None:
    """A1111 and ComfyUI: n of n + 1 evenly spaced timesteps, linear in log sigma between whole ones."""
    logs = np.log(exact_sigmas())
    for n in (1, 9, 20, 27, 30):
        expected = np.exp(np.interp(999 - 999 * np.arange(n) / n, np.arange(1000), logs))
        ours = GRIDS["sgm_uniform"](SCHEDULE, n)[:-1]
        assert np.abs(ours.double().numpy() / expected - 1).max() < 1e-6
        truncated = [math.floor(999 - 999 * i / n + 1e-9) for i in range(n)]
        assert indices(GRIDS["sgm"](SCHEDULE, n)) == truncated


@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("n", [2, 3, 10, 30, 50])
def test_karras_and_exponential_are_diffusers(name: str, n: int) -> None:
    scheduler = theirs(
        timestep_spacing="linspace",
        sigma_min=SCHEDULE.sigma_min,
        sigma_max=SCHEDULE.sigma_max,
        **{f"use_{name}_sigmas": True},
    )
    scheduler.set_timesteps(n)
    assert torch.allclose(GRIDS[name](SCHEDULE, n), scheduler.sigmas, rtol=1e-6)


def test_karras_and_exponential_are_as_in_the_papers() -> None:
    sigmas = GRIDS["karras"](SCHEDULE, 11).double()[:-1]
    assert torch.allclose((sigmas ** (1 / 7)).diff(), (sigmas ** (1 / 7)).diff().mean(), rtol=1e-5)
    sigmas = GRIDS["exponential"](SCHEDULE, 11).double()[:-1]
    assert torch.allclose(sigmas.log().diff(), sigmas.log().diff().mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["sgm", "trailing", "leading"])
def test_no_more_steps_than_levels_to_pick_from(name: str) -> None:
    """A level picked twice would be a step of length zero."""
    with pytest.raises(UsageError, match=r"--steps 1001: .* 1000 noise levels"):
        GRIDS[name](SCHEDULE, 1001)
    assert len(GRIDS["karras"](SCHEDULE, 1001)) == 1002


def test_every_level_is_its_own_nearest() -> None:
    assert [SCHEDULE.index_of(sigma) for sigma in SCHEDULE.sigmas.tolist()] == list(range(1000))


def test_the_nearest_level_is_the_lower_on_a_tie() -> None:
    steps = NoiseSchedule(torch.tensor([1.0, 2.0, 4.0]))
    cases = {0.0: 0, 1.0: 0, 1.49: 0, 1.5: 0, 1.51: 1, 3.0: 1, 3.01: 2, 100.0: 2}
    assert {sigma: steps.index_of(sigma) for sigma in cases} == cases


def test_levels_at_fractional_indices() -> None:
    at = SCHEDULE.at(torch.tensor([0.0, 999.0, 499.25], dtype=torch.float64))
    low, high = (float(SCHEDULE.sigmas[i]) for i in (499, 500))
    expected = torch.tensor([SCHEDULE.sigma_min, SCHEDULE.sigma_max, low**0.75 * high**0.25])
    assert torch.allclose(at, expected, rtol=1e-6)


def test_names_are_found_and_unknown_ones_explained() -> None:
    for name, grid in (
        ("SGM Uniform", "sgm_uniform"),
        ("Karras", "karras"),
        ("uniform", "normal"),
        ("leading", "leading"),
    ):
        assert schedule.resolve(name) is GRIDS[grid]
    with pytest.raises(UsageError, match="karras"):
        schedule.resolve("karas")
