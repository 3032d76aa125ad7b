"""``sdxl samplers``: which samplers and schedulers there are, and what may be set of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Json, Quiet

if TYPE_CHECKING:
    from sdxl_cli.console import Cell
    from sdxl_cli.diffusion.grids import Grid
    from sdxl_cli.diffusion.samplers.base import Sampler

PANEL = "Inspect"

NOISE = {"none": "none", "fresh": "each step", "path": "Brownian path"}


def command(quiet: Quiet = False, as_json: Json = False) -> None:
    """List the samplers and schedulers, with their options."""
    console = consoles.configure(quiet=quiet, json=as_json)

    from sdxl_cli.diffusion.grids import GRIDS, grid_options
    from sdxl_cli.diffusion.names import schedule_label
    from sdxl_cli.diffusion.samplers import SAMPLERS

    console.table(
        ["--sampler", "label", "evaluations", "order", "noise", "auto scheduler", "options"],
        [_row(sampler) for sampler in SAMPLERS.values()],
        title="Samplers: evaluations of the network a step, order of convergence, added noise",
    )
    console.table(
        ["--scheduler", "label", "levels", "options"],
        [
            [name, schedule_label(name), _summary(grid), _texts(grid_options(grid))]
            for name, grid in GRIDS.items()
        ],
        title="Schedulers",
    )
    console.note("options go after the name: --sampler dpmpp_2m_sde:eta=0.5 --scheduler karras:rho=5")
    console.json(
        {
            "samplers": [
                {
                    "name": sampler.name,
                    "label": sampler.label,
                    "evaluations": sampler.evaluations,
                    "order": sampler.order,
                    "noise": _noise(sampler),
                    "scheduler": sampler.grid,
                    "options": _set(sampler),
                }
                for sampler in SAMPLERS.values()
            ],
            "schedulers": [
                {
                    "name": name,
                    "label": schedule_label(name),
                    "levels": _summary(grid),
                    "options": grid_options(grid),
                }
                for name, grid in GRIDS.items()
            ],
        }
    )


def _row(sampler: Sampler) -> list[Cell]:
    order = sampler.order or None
    noise = NOISE[_noise(sampler)]
    texts = _texts(_set(sampler))
    return [sampler.name, sampler.label, sampler.evaluations, order, noise, sampler.grid, texts]


def _noise(sampler: Sampler) -> str:
    """Where it comes from, or that there is none unless eta is raised."""
    return sampler.randomness if getattr(sampler, "eta", 1.0) else "none"


def _set(sampler: Sampler) -> dict[str, object]:
    """Its options with their values; None is "no limit"."""
    from sdxl_cli.diffusion.names import sampler_options

    values = {key: getattr(sampler, key) for key in sampler_options(sampler)}
    return {key: None if value == math.inf else value for key, value in values.items()}


def _summary(grid: Grid) -> str:
    return (grid.__doc__ or "").splitlines()[0].rstrip(".").replace("`", "")


def _texts(options: Mapping[str, object]) -> str:
    return " ".join(
        key if value is None else f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in options.items()
    )
