"""Who does which steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.plan import plan_generation, plan_refinement, size_multiple, steps_above
from sdxl_cli.generation.request import GenerateRequest, RefineRequest
from sdxl_cli.model.config import BASE, REFINER, TINY

REQUEST = GenerateRequest(prompt="", seed=1, steps=30, scheduler="sgm", sampler="euler")


def test_base_alone_does_all_steps_of_the_originals_grid() -> None:
    plan = plan_generation(replace(REQUEST, steps=10), BASE)
    assert plan.timesteps == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert plan.split() == "base: 10 steps t=999→99"


def test_the_refiner_takes_over_below_timestep_200_on_any_grid() -> None:
    """It was trained on t < 200; cutting by step count would hand it more, or less (diffusers#4115)."""
    for scheduler in ("sgm", "karras", "normal", "trailing", "leading", "exponential"):
        plan = plan_generation(replace(REQUEST, scheduler=scheduler), BASE, REFINER)
        base, refiner = plan.timesteps[: plan.base_steps], plan.timesteps[plan.base_steps :]
        assert min(base) >= 200
        assert max(refiner) < 200
        assert len(base) + len(refiner) == 30
    assert (
        plan_generation(REQUEST, BASE, REFINER).split()
        == "base: 24 steps t=999→233 | refiner: 6 steps t=199→33"
    )


def test_the_cut_is_that_of_diffusers() -> None:
    """StableDiffusionXLPipeline.denoising_end keeps timesteps >= round(1000 - 1000 · end)."""
    for switch in (0.5, 0.75, 0.8, 0.9, 1.0):
        plan = plan_generation(replace(REQUEST, refiner_switch_at=switch), BASE, REFINER)
        kept = [t for t in plan.timesteps if t >= round(1000 - 1000 * switch)]
        assert plan.base_steps == len(kept) == steps_above(plan.schedule, plan.sigmas, switch)
    assert plan.base_steps == 30


@pytest.mark.parametrize("steps", [1, 5, 20, 30, 50])
@pytest.mark.parametrize("strength", [0.15, 0.3, 0.5, 1.0])
def test_refinement_runs_as_many_steps_as_the_original(steps: int, strength: float) -> None:
    """sgm Img2ImgDiscretizationWrapper: the grid upside down, cut after max(int(strength · len), 1), turned back."""
    request = RefineRequest(prompt="", steps=steps, strength=strength, scheduler="sgm", seed=1)
    whole = plan_generation(replace(REQUEST, steps=steps), BASE).sigmas
    expected = torch.flip(torch.flip(whole, (0,))[: max(int(strength * len(whole)), 1)], (0,))
    if len(expected) == 1:
        with pytest.raises(UsageError, match="leaves none to run; give at least --strength"):
            plan_refinement(request, (1024, 1024))
    else:
        assert torch.equal(plan_refinement(request, (1024, 1024)).sigmas, expected)


def test_the_strength_suggested_is_enough() -> None:
    with pytest.raises(UsageError, match=r"at least --strength 0\.07") as caught:
        plan_refinement(RefineRequest(prompt="", strength=0.01, seed=1), (64, 64))
    suggested = float(str(caught.value).split("at least --strength ")[1].split(",")[0])
    assert plan_refinement(RefineRequest(prompt="", strength=suggested, seed=1), (64, 64)).steps == 1


def test_sizes_are_whole_latents() -> None:
    assert size_multiple(TINY) == size_multiple(BASE) == size_multiple(BASE, REFINER) == 8


def test_what_is_left_open_is_written_down() -> None:
    plan = plan_generation(GenerateRequest(prompt="x", scheduler="Karras", sampler="DPM++ 2M"), TINY)
    request = plan.request
    assert isinstance(request, GenerateRequest)
    assert (request.size, request.sampler, request.scheduler) == ("256x256", "dpmpp_2m", "karras")
    assert request.seed >= 0


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"sampler": "eulr"}, "did you mean.*euler"), ({"scheduler": "kerras"}, "did you mean.*karras")],
)
def test_unknown_names_come_with_the_nearest(asked: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_generation(replace(REQUEST, **asked), TINY)  # type: ignore[arg-type]
