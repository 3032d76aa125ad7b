"""k-diffusion and diffusers' schedulers, brought to the form of our samplers."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from torch import Tensor

from sdxl_cli.diffusion.schedule import NoiseSchedule

Denoise = Callable[[Tensor, float], Tensor]
SCHEDULE = NoiseSchedule()


class NoNoise:
    """For deterministic runs."""

    def fresh(self, x: Tensor) -> Tensor:
        raise AssertionError("deterministic samplers draw no noise")

    def between(self, x: Tensor, sigma: float, following: float) -> Tensor:
        raise AssertionError("deterministic samplers draw no noise")


class Tape:
    """The same noise for us and for the others: a number of the draw, or the pair of levels, is its seed."""

    def __init__(self) -> None:
        self.draws = 0

    def fresh(self, x: Tensor) -> Tensor:
        self.draws += 1
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(self.draws), dtype=x.dtype)

    def between(self, x: Tensor, sigma: float, following: float) -> Tensor:
        # rounded, because levels between two steps are computed in different orders
        seed = round(500 * math.log(float(sigma))) * 10**5 + round(500 * math.log(float(following)))
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def k_diffusion() -> ModuleType:
    """k-diffusion's ``sampling`` module alone.

    The package wants numpy < 2, wandb and others that samplers have nothing to do with, so it is installed with
    ``pip install --no-deps k-diffusion``, and its ``__init__``, which imports them all, is left out.
    """
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs: pip install --no-deps k-diffusion")
    package = ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    # for its adaptive solvers and its own Brownian tree, which are not compared with
    unused = {name: ModuleType(name) for name in ("torchdiffeq", "torchsde") if name not in sys.modules}
    if "torchdiffeq" in unused:
        unused["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    sys.modules.update(unused, k_diffusion=package)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in unused:
            del sys.modules[name]


K_NAMES = {
    "euler": "euler",
    "euler_a": "euler_ancestral",
    "heun": "heun",
    "dpm2": "dpm_2",
    "dpm2_a": "dpm_2_ancestral",
    "lms": "lms",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun": "dpmpp_2m_sde",
    "dpmpp_3m_sde": "dpmpp_3m_sde",
    "dpmpp_sde": "dpmpp_sde",
    "dpmpp_2s_a": "dpmpp_2s_ancestral",
}
"""Ours -> k-diffusion's."""
BETWEEN = {"dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde"}
"""k-diffusion's samplers that take a Brownian tree."""


def k_path(
    ours: str, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Any, **options: Any
) -> list[Tensor]:
    """x after every step of k-diffusion's sampler.

    With churn the callback sees x after noise is added, so that then only the last x can be compared.
    """
    module, name = k_diffusion(), K_NAMES[ours]
    starts: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, float(sigma[0]))

    if "ancestral" in name:
        options["noise_sampler"] = lambda sigma, following: noise.fresh(x)
    elif name in BETWEEN:
        options["noise_sampler"] = lambda sigma, following: noise.between(x, float(sigma), float(following))
    if ours == "dpmpp_2m_sde_heun":
        options["solver_type"] = "heun"
    churns = bool(options.get("s_churn"))
    # without churn the noise is drawn, and not used
    with mock.patch.object(torch, "randn_like", noise.fresh if churns else torch.zeros_like):
        end = getattr(module, "sample_" + name)(
            model, x, sigmas, callback=lambda seen: starts.append(seen["x"]), disable=True, **options
        )
    return [*starts[1:], end]


SINGLE = {"euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m"}
"""diffusers' classes that compute in single precision, whatever they are given."""
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"lower_order_final": False}),
    "dpmpp_2m_sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "lower_order_final": False},
    ),
    "dpmpp_2m_sde_heun": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "lower_order_final": False},
    ),
    "dpmpp_3m": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
    ),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"lower_order_final": False}),
    "lcm": ("LCMScheduler", {"timestep_scaling": 1e9}),
    "tcd": ("TCDScheduler", {}),
}
"""Ours -> diffusers' class and configuration. LCM's large scaling takes out its boundary condition."""
ON_TIMESTEPS = {"ddim", "ddpm", "lcm", "tcd"}
"""diffusers' classes that look levels up by timestep."""


def diffusers_path(
    ours: str, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Any, **options: Any
) -> list[Tensor]:
    """x after every step of diffusers' scheduler, on our levels, in our scaling clean + sigma · noise."""
    kind, settings = DIFFUSERS[ours]
    given = {key: value for key, value in options.items() if key != "eta"}
    scheduler: Any = getattr(diffusers, kind)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings | given
    )
    steps = len(sigmas) - 1
    timesteps = [SCHEDULE.index_of(sigma) for sigma in sigmas[:-1].tolist()]
    if ours in ("ddim", "ddpm"):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == timesteps, "their previous timestep is counted, not looked up"
    elif ours in ("lcm", "tcd"):
        scheduler.set_timesteps(steps, original_inference_steps=50)
        assert scheduler.timesteps.tolist() == timesteps
    else:
        # the places are of no matter: levels are set below
        scheduler.set_timesteps(steps)
        scheduler.timesteps = torch.arange(steps, 0, -1) * (999.0 // steps)
    # their tables are rounded to single precision one step too early
    if ours in ON_TIMESTEPS:
        scheduler.alphas_cumprod = 1 / (1 + SCHEDULE.sigmas.double() ** 2)
    else:
        scheduler.sigmas = sigmas.clone()
    extra: dict[str, Any] = {"eta": options["eta"]} if "eta" in options else {}
    preserving = ours != "euler"  # keeps the variance: x / sqrt(1 + sigma²)
    path = []

    def drawn(*_: Any, **__: Any) -> Tensor:
        sigma, following = sigmas[len(path)], sigmas[len(path) + 1]
        if "sde" in ours:
            return noise.between(x, sigma, following) if following else torch.zeros_like(x)
        return noise.fresh(x)

    module = sys.modules[scheduler.__module__]
    with mock.patch.object(module, "randn_tensor", drawn, create=True):
        for t, (sigma, following) in zip(
            scheduler.timesteps, zip(sigmas, sigmas[1:], strict=False), strict=True
        ):
            eps = (x - denoise(x, float(sigma))) / sigma
            scale = (1 + sigma**2).sqrt() if preserving else torch.ones(())
            if ours == "ddim" and options.get("eta"):
                extra["variance_noise"] = drawn() if following else torch.zeros_like(x)
            after = scheduler.step(eps, t, x / scale, **extra).prev_sample
            x = after * (1 + following**2).sqrt() if preserving else after
            path.append(x)
    return path
