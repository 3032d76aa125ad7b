"""From names in a request to noise levels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.samplers.tcd import TCD
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.levels import settle
from sdxl_cli.generation.plan import plan_generation, plan_refinement
from sdxl_cli.generation.request import GenerateRequest, RefineRequest
from sdxl_cli.model.config import BASE

SCHEDULE = NoiseSchedule()
REQUEST = GenerateRequest(prompt="", steps=12, seed=1)


def named(**changes: Any) -> tuple[str, str]:
    levels = settle(replace(REQUEST, **changes), SCHEDULE)
    return levels.sampler_name, levels.scheduler


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        ("dpmpp_2m", "auto", ("dpmpp_2m", "karras")),
        ("euler", "auto", ("euler", "sgm")),
        ("DPM++ 2M SDE", "Automatic", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE Karras", "auto", ("dpmpp_2m_sde", "karras")),
        ("DPM++ 2M SDE Karras", "karras:rho=5", ("dpmpp_2m_sde", "karras:rho=5")),
        ("euler:s_churn=5", "SGM Uniform", ("euler:s_churn=5", "sgm_uniform")),
    ],
)
def test_auto_is_what_the_name_says_or_what_suits(
    sampler: str, scheduler: str, expected: tuple[str, str]
) -> None:
    assert named(sampler=sampler, scheduler=scheduler) == expected


def test_a_settled_request_settles_to_the_same_again() -> None:
    """As when a picture is made again from what it says of itself."""
    for changes in (
        {"sampler": "DPM++ 2M SDE Karras", "eta": 0.5},
        {"sampler": "k_euler_a", "s_noise": 0.9},
        {"sampler": "lcm", "sigmas": "14.6 3 0.5"},
        {"sampler": "euler:s_tmax=5", "scheduler": "karras:sigma_min=0.1", "s_churn": 2.0},
    ):
        request = replace(REQUEST, **changes)
        first = settle(request, SCHEDULE)
        again = settle(first.named(request), SCHEDULE)
        assert again.named(first.named(request)) == first.named(request)
        assert again.sampler == first.sampler
        assert torch.equal(again.grid(again.steps), first.grid(first.steps))


def test_a_refinement_takes_the_originals_grid_unless_a_name_says_another() -> None:
    request = RefineRequest(prompt="", seed=1)
    assert plan_refinement(request, (64, 64)).request.scheduler == "sgm"
    assert (
        plan_refinement(replace(request, sampler="DPM++ 2M Karras"), (64, 64)).request.scheduler == "karras"
    )


def test_levels_one_by_one_take_the_place_of_scheduler_and_steps() -> None:
    plan = plan_generation(replace(REQUEST, sigmas="14.6, 6.3,2.2 ,0.9,0.4,0.1"), BASE)
    assert plan.sigmas.tolist() == pytest.approx([14.6, 6.3, 2.2, 0.9, 0.4, 0.1, 0.0])
    assert (plan.request.steps, plan.request.scheduler, plan.base_steps) == (6, "custom", 6)
    plan = plan_generation(replace(REQUEST, timesteps="[999, 845, 730, 13]"), BASE)
    assert plan.timesteps == [999, 845, 730, 13]


def test_the_grid_of_comfyui_keeps_its_odd_step() -> None:
    plan = plan_generation(replace(REQUEST, sampler="euler", scheduler="ddim_uniform", steps=30), BASE)
    assert (plan.steps, plan.timesteps[0], plan.timesteps[-1]) == (31, 991, 1)


def test_the_samplers_of_dpm2_leave_out_the_last_level_above_zero() -> None:
    """A1111 and ComfyUI: a grid of n + 1, without its last but one."""
    plan = plan_generation(replace(REQUEST, sampler="DPM2 a", scheduler="karras"), BASE)
    whole = GRIDS["karras"](SCHEDULE, 13)
    assert torch.equal(plan.sigmas, torch.cat([whole[:12], whole[13:]]))


def test_tcd_counts_in_the_models_own_levels() -> None:
    schedule = NoiseSchedule(SCHEDULE.sigmas * 2)
    sampler = settle(replace(REQUEST, sampler="tcd"), schedule).sampler
    assert isinstance(sampler, TCD)
    assert sampler.schedule is schedule


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "DPM++ 2M Karras", "scheduler": "sgm"}, "says karras, --scheduler says sgm"),
        ({"scheduler": "custom"}, "--sigmas or --timesteps"),
        ({"sigmas": "14,1", "timesteps": "999"}, "twice"),
        ({"sigmas": "14,1", "scheduler": "karras"}, "leave --scheduler out"),
        ({"sigmas": "14,1", "sampler": "DPM++ 2M Karras"}, "leave --scheduler out"),
        ({"sigmas": "14;1"}, "commas"),
        ({"sigmas": "1,14"}, "smaller than the one before"),
        ({"sampler": "dpmpp_2m", "eta": 0.3}, "--eta: dpmpp_2m has no option eta"),
        ({"sigmas": "14,1", "hires_scale": 2.0, "hires_steps": 7}, "they are 2 steps, and 7 are needed"),
    ],
)
def test_what_cannot_be_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_generation(replace(REQUEST, **changes), BASE)
