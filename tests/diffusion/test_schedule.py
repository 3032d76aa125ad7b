"""Noise levels and grids, against numpy and against diffusers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules
from scipy import stats

from sdxl_cli.diffusion import grids
from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.quantile import beta_quantile
from sdxl_cli.diffusion.schedule import NoiseSchedule, sigma_table
from sdxl_cli.errors import UsageError
from tests.diffusion.peers import k_diffusion

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
        assert torch.equal(grids.sgm(SCHEDULE, n)[:-1], table[torch.from_numpy(indices)]), n
    ten = [SCHEDULE.index_of(sigma) for sigma in grids.sgm(SCHEDULE, 10)[:-1].tolist()]
    assert ten == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 30, 50, 999, 1000])
def test_every_grid_descends_from_the_top_to_zero(name: str, n: int) -> None:
    if name == "lcm" and n > 50:
        pytest.skip("there are 50")
    sigmas = GRIDS[name](SCHEDULE, n)
    assert sigmas.dtype == torch.float32
    assert len(sigmas) == n + 1 or name in ("ddim_uniform", "beta")
    assert float(sigmas[-1]) == 0.0
    assert (sigmas.diff() < 0).all()
    assert float(sigmas[0]) <= SCHEDULE.sigma_max * (1 + 1e-6)
    if name not in ("leading", "ddim_uniform"):
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


@pytest.mark.parametrize("name", ["sgm", "trailing", "leading", "simple", "ddim_uniform", "beta"])
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


def test_polyexponential_is_k_diffusions() -> None:
    ends = SCHEDULE.sigma_min, SCHEDULE.sigma_max
    for rho in (1.0, 0.5, 2.0):
        theirs = k_diffusion().get_sigmas_polyexponential(13, *ends, rho=rho)
        assert torch.allclose(grids.polyexponential(SCHEDULE, 13, rho=rho), theirs, rtol=2e-6)
    theirs = k_diffusion().get_sigmas_karras(13, 0.1, 10.0, rho=3.0)
    assert torch.allclose(
        grids.karras(SCHEDULE, 13, rho=3.0, sigma_min=0.1, sigma_max=10.0), theirs, rtol=2e-6
    )


@pytest.mark.parametrize("n", [1, 2, 7, 30, 999])
def test_simple_and_ddim_uniform_are_comfyuis(n: int) -> None:
    """Counted as its loops count."""
    table = SCHEDULE.sigmas.tolist()
    simple = [table[-(1 + int(x * (len(table) / n)))] for x in range(n)]
    assert grids.simple(SCHEDULE, n).tolist() == [*simple, 0.0]
    uniform, x = [], 1
    while x < len(table):
        uniform.append(table[x])
        x += len(table) // n
    assert grids.ddim_uniform(SCHEDULE, n).tolist() == [*uniform[::-1], 0.0]


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (0.5, 2.0), (3.0, 0.7)])
def test_beta_quantiles_are_scipys(a: float, b: float) -> None:
    shares = torch.cat([torch.linspace(0, 1, 101, dtype=torch.float64), torch.tensor([1e-9, 1 - 1e-9])])
    expected = torch.from_numpy(stats.beta.ppf(shares.numpy(), a, b))
    assert torch.allclose(beta_quantile(shares, a, b), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("n", [1, 5, 20, 30, 200])
def test_beta_is_comfyuis(n: int) -> None:
    """Quantiles by scipy, rounded as numpy does, each index once."""
    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.6, 0.6)
    chosen = dict.fromkeys(np.rint(quantiles * 999).astype(int).tolist())
    assert indices(grids.beta(SCHEDULE, n)) == list(chosen)


def test_kl_optimal_is_even_in_the_arctangent() -> None:
    angles = np.linspace(math.atan(SCHEDULE.sigma_max), math.atan(SCHEDULE.sigma_min), 9)
    assert np.allclose(grids.kl_optimal(SCHEDULE, 9)[:-1], np.tan(angles), rtol=1e-6)


def test_align_your_steps_is_the_published_table() -> None:
    """NVIDIA's timesteps, and diffusers' table of them; between the levels numpy interpolates."""
    ten = grids.align_your_steps(SCHEDULE, 10)
    assert indices(ten) == AysSchedules["StableDiffusionXLTimesteps"]
    assert np.allclose(ten, AysSchedules["StableDiffusionXLSigmas"], rtol=0.015)
    logs = np.log([14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029])
    for n in (1, 4, 20, 33):
        expected = np.exp(np.interp(np.linspace(0, 10, n + 1), np.arange(11), logs))[:-1]
        assert np.allclose(grids.align_your_steps(SCHEDULE, n)[:-1], expected, rtol=0.015)


@pytest.mark.parametrize("n", [1, 2, 4, 7, 8, 50])
def test_lcm_is_diffusers(n: int) -> None:
    scheduler = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(n, original_inference_steps=50)
    assert indices(grids.lcm(SCHEDULE, n)) == scheduler.timesteps.tolist()
    with pytest.raises(UsageError, match="--steps 51"):
        grids.lcm(SCHEDULE, 51)


def test_levels_one_by_one() -> None:
    for given in ([14.6, 3.0, 0.5], [14.6, 3.0, 0.5, 0.0]):
        assert torch.equal(grids.given_sigmas(SCHEDULE, given), torch.tensor([14.6, 3.0, 0.5, 0.0]))
    steps = grids.given_timesteps(SCHEDULE, [999, 499, 0])
    assert torch.allclose(steps[:-1], SCHEDULE.sigmas[[999, 499, 0]])
    for wrong in ([], [0.0], [1.0, 2.0], [2.0, 2.0], [3.0, -1.0], [math.nan], [3.0, 0.0, 0.0], [80.0, 1.0]):
        with pytest.raises(UsageError, match="--sigmas"):
            grids.given_sigmas(SCHEDULE, wrong)
    for wrong in ([], [1000], [5, 9], [-1]):
        with pytest.raises(UsageError, match="--timesteps"):
            grids.given_timesteps(SCHEDULE, wrong)


def test_ends_must_be_in_order() -> None:
    with pytest.raises(UsageError, match="sigma_min 20"):
        grids.karras(SCHEDULE, 5, sigma_min=20.0)
