"""Names as people type them in other programs, and what an unknown one is answered."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.names import (
    SCHEDULE_LABELS,
    find_grid,
    find_sampler,
    is_auto,
    sampler_options,
    schedule_label,
)
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.errors import UsageError

# A1111's labels | ComfyUI | diffusers | sd.cpp | Invoke, and old A1111 names of its API
SPELLINGS = {
    "euler": "Euler | euler | EulerDiscreteScheduler | euler | k_euler",
    "euler_a": "Euler a | euler_ancestral | EulerAncestralDiscreteScheduler | euler_a | k_euler_a | Euler A",
    "heun": "Heun | heun | HeunDiscreteScheduler | k_heun",
    "dpm2": "DPM2 | dpm_2 | KDPM2DiscreteScheduler | dpm2 | kdpm_2 | k_dpm_2",
    "dpm2_a": "DPM2 a | dpm_2_ancestral | KDPM2AncestralDiscreteScheduler | kdpm_2_a | k_dpm_2_a",
    "lms": "LMS | lms | LMSDiscreteScheduler | k_lms",
    "dpmpp_2m": "DPM++ 2M | dpmpp_2m | DPMSolverMultistepScheduler | dpm++2m | dpmpp-2m | DPM++_2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE | dpmpp_2m_sde | dpmpp_2m_sde_gpu | dpm++2m_sde"
    "| DPMSolverMultistepScheduler algorithm_type=sde-dpmsolver++"
    "| DPMSolverMultistepScheduler;algorithm-type=sde-dpmsolver++;solver-order=2",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun | dpmpp_2m_sde_heun | dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde": "DPM++ 3M SDE | dpmpp_3m_sde | dpmpp_3m_sde_gpu",
    "dpmpp_3m": "dpmpp_3m | DPMSolverMultistepScheduler(solver_order=3)",
    "dpmpp_sde": "DPM++ SDE | dpmpp_sde | DPMSolverSDEScheduler | dpmpp_sde_gpu",
    "dpmpp_2s_a": "DPM++ 2S a | dpmpp_2s_ancestral | dpm++2s_a",
    "ddim": "DDIM | ddim | DDIMScheduler",
    "ddpm": "DDPM | ddpm | DDPMScheduler",
    "unipc": "UniPC | uni_pc | uni_pc_bh2 | UniPCMultistepScheduler | unipc",
    "deis": "DEIS | deis | DEISMultistepScheduler",
    "lcm": "LCM | lcm | LCMScheduler",
    "tcd": "TCD | tcd | TCDScheduler",
}
BOTH = {
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 2M SDE Heun Exponential": ("dpmpp_2m_sde_heun", "exponential"),
    "DPM++ 3M SDE SGM Uniform": ("dpmpp_3m_sde", "sgm_uniform"),
    "DPM2 a Karras": ("dpm2_a", "karras"),
    "LMS Karras": ("lms", "karras"),
    "k_dpmpp_2m_ka": ("dpmpp_2m", "karras"),
    "dpmpp_2m_k": ("dpmpp_2m", "karras"),
    "euler_k": ("euler", "karras"),
    "dpmpp_2m_sde_k": ("dpmpp_2m_sde", "karras"),
    "ddim_trailing": ("ddim", "trailing"),
    "DPMSolverMultistepScheduler use_karras_sigmas=True": ("dpmpp_2m", "karras"),
    "EulerDiscreteScheduler(timestep_spacing='trailing', use_karras_sigmas=False)": ("euler", "trailing"),
    "DPMSolverMultistepScheduler;algorithm-type=sde-dpmsolver++;use-karras-sigmas=true": (
        "dpmpp_2m_sde",
        "karras",
    ),
}
GRID_SPELLINGS = {
    "normal": "Uniform | Normal | normal | discrete | linspace",
    "karras": "Karras | KARRAS | karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform | sgm_uniform | SGMUniform",
    "simple": "Simple | simple",
    "ddim_uniform": "DDIM | ddim_uniform",
    "beta": "Beta | beta",
    "kl_optimal": "KL Optimal | kl_optimal",
    "align_your_steps": "Align Your Steps | align_your_steps | ays | AYS",
    "trailing": "trailing | turbo",
    "leading": "leading",
    "sgm": "sgm | LegacyDDPM",
    "lcm": "lcm",
}


def spellings(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(text.strip(), name) for name, texts in table.items() for text in texts.split("|")]


@pytest.mark.parametrize(("text", "name"), spellings(SPELLINGS))
def test_samplers_in_every_spelling(text: str, name: str) -> None:
    choice = find_sampler(text)
    assert (choice.sampler, choice.grid) == (SAMPLERS[name], None)


def test_every_sampler_and_scheduler_has_its_spellings_tested() -> None:
    assert SPELLINGS.keys() == SAMPLERS.keys()
    assert GRID_SPELLINGS.keys() == GRIDS.keys()


@pytest.mark.parametrize("text", BOTH)
def test_one_name_for_sampler_and_scheduler(text: str) -> None:
    choice = find_sampler(text)
    assert choice.grid is not None
    assert (choice.sampler, choice.grid.name) == (SAMPLERS[BOTH[text][0]], BOTH[text][1])


@pytest.mark.parametrize(("text", "name"), spellings(GRID_SPELLINGS))
def test_schedulers_in_every_spelling(text: str, name: str) -> None:
    assert find_grid(text).name == name


def test_options_go_after_the_name_and_come_back_in_it() -> None:
    for text, changes in (
        ("euler:s_churn=5", {"s_churn": 5.0}),
        ("dpmpp_2m_sde:eta=0.5,s_noise=1.1", {"eta": 0.5, "s_noise": 1.1}),
        ("lms:solver_order=2", {"solver_order": 2}),
        ("unipc:solver_type=bh1,solver_order=3", {"solver_type": "bh1", "solver_order": 3}),
    ):
        choice = find_sampler(text)
        assert choice.sampler == replace(SAMPLERS[text.split(":")[0]], **changes)
        assert find_sampler(str(choice)) == choice
    assert str(find_sampler("DPM++ 2M SDE Karras; eta = 1.0")) == "dpmpp_2m_sde"
    assert str(find_grid("Karras rho=5")) == "karras:rho=5"
    assert str(find_grid("karras:rho=7")) == "karras"
    assert find_sampler("dpmpp_2s").sampler == replace(SAMPLERS["dpmpp_2s_a"], eta=0.0)


def test_flags_win_over_the_name() -> None:
    assert find_sampler("euler_a:eta=0.5", {"eta": 0.25, "s_noise": None}).sampler == replace(
        SAMPLERS["euler_a"], eta=0.25
    )


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("eulr", {}, "did you mean euler"),
        ("DPM++ 2M SED", {}, "did you mean dpmpp_2m_sde|did you mean DPM"),
        ("plms", {}, "did you mean"),
        ("DPM adaptive", {}, "unknown"),
        ("euler:eta=1", {}, r"euler has no option eta \(it has s_churn.*samplers with eta: euler_a"),
        ("dpmpp_2m", {"eta": 0.5}, r"--eta: dpmpp_2m has no option eta \(it has none\)"),
        ("euler_a", {"eta": -1.0}, "--eta -1.0 must be at least 0"),
        ("tcd", {"eta": 1.5}, "--eta 1.5 must be at least 0 and at most 1"),
        ("lms:solver_order=9", {}, "at least 1 and at most 4"),
        ("lms:solver_order=two", {}, "must be a whole number"),
        ("unipc:solver_type=bh3", {}, "must be bh1 or bh2"),
        ("DPMSolverMultistepScheduler algorithm_type=dpmsolver", {}, "there are dpmsolver"),
    ],
)
def test_what_does_not_exist_is_explained(text: str, flags: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_sampler(text, flags)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("karas", "did you mean karras"),
        ("gits", "unknown"),
        ("sgm:rho=3", "no option rho"),
        ("karras:rho=x", "number"),
    ],
)
def test_unknown_schedulers(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_grid(text)


def test_auto_is_no_grid() -> None:
    assert is_auto("auto")
    assert is_auto("Automatic")
    assert not is_auto("karras")


def test_a_label_of_a1111_is_for_one_scheduler_only() -> None:
    """A reader would take one for the other; what A1111 does not have goes by our name."""
    assert len(set(SCHEDULE_LABELS.values())) == len(SCHEDULE_LABELS)
    assert SCHEDULE_LABELS.keys() <= GRIDS.keys()
    for name in ("sgm", "trailing", "leading", "lcm", "custom"):
        assert schedule_label(name) == name
    assert schedule_label("karras:rho=5") == "Karras"


def test_every_sampler_can_be_chosen_without_a_scheduler() -> None:
    for sampler in SAMPLERS.values():
        assert sampler.grid in GRIDS
        assert all(field.metadata["text"] for field in sampler_options(sampler).values())


def test_the_page_has_a_measured_row_for_each() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    for name, sampler in SAMPLERS.items():
        assert f"| `{name}` | {sampler.label} | " in page, (
            f"{name}: run python -m tools.sampler_table --write"
        )
    for name in GRIDS:
        label = schedule_label(name)
        assert re.search(
            rf"^\| `{name}` \| {re.escape(label) if label != name else ''} ?\| ", page, re.MULTILINE
        )
