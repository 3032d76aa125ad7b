"""Measure every sampler against its reference and against a known flow, and write the table of docs/samplers.md.

From the top of the checkout: ``python -m tools.sampler_table`` prints it, with ``--write`` it goes into the page.
Needs the test requirements and ``pip install --no-deps k-diffusion``.
"""

from __future__ import annotations

import argparse
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.samplers import SAMPLERS
from tests.diffusion.mixture import even_in_log, order_of, slow_start
from tests.diffusion.peers import DIFFUSERS, K_NAMES, SCHEDULE, Denoise, Tape, diffusers_path, k_path
from tests.diffusion.test_samplers import bent
from tests.diffusion.test_trajectories import World, make_world

PAGE = Path(__file__).resolve().parents[1] / "docs" / "samplers.md"
BEGIN, END = "<!-- table: python -m tools.sampler_table --write -->\n", "<!-- end of the table -->\n"
NOISE = {"none": "none", "fresh": "each step", "path": "Brownian path"}


def worst(name: str, reference: str, denoise: Denoise, x: Tensor, dtype: torch.dtype) -> float:
    """The largest difference in any step, relative to the largest value there."""
    sigmas = GRIDS["lcm" if name in ("lcm", "tcd") else "trailing"](SCHEDULE, 10).to(dtype)
    if name == "deis":
        sigmas = sigmas[:-1]
    theirs = (k_path if reference == "k-diffusion" else diffusers_path)(name, denoise, x, sigmas, Tape())
    ours = list(SAMPLERS[name].steps(denoise, x, sigmas, Tape()))
    if name == "tcd":
        ours, theirs = ours[:-1], theirs[:-1]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def order(name: str) -> str:
    """Measured with the noise turned off; the multistep ones get short first steps."""
    sampler = SAMPLERS[name]
    if name == "lcm":
        return "-"
    if hasattr(sampler, "eta"):
        sampler = replace(sampler, eta=0.0)
    return (
        f"{order_of(sampler, slow_start if name in ('lms', 'dpmpp_3m', 'dpmpp_3m_sde') else even_in_log):.2f}"
    )


def rows(world: World) -> list[list[str]]:
    """A row for each sampler and reference."""
    analytic = torch.linspace(-20, 20, 22, dtype=torch.float64).reshape(2, 11)
    start = world.noise * (1 + SCHEDULE.sigma_max**2) ** 0.5
    network = world.guided("eps")
    found = []
    for name, sampler in SAMPLERS.items():
        references = [
            other for other, names in (("k-diffusion", K_NAMES), ("diffusers", DIFFUSERS)) if name in names
        ]
        assert references, f"{name} is compared with nothing"
        for index, reference in enumerate(references):
            errors = [
                f"{worst(name, reference, bent, analytic, torch.float64):.0e}",
                f"{worst(name, reference, network, start, torch.float32):.0e}",
            ]
            if index:
                found.append(["", "", reference, *errors, "", "", ""])
                continue
            noise = NOISE[sampler.randomness if getattr(sampler, "eta", 1.0) else "none"]
            first = [f"`{name}`", sampler.label, reference, *errors]
            found.append([*first, order(name), str(sampler.evaluations), noise])
    return found


def table(lines: list[list[str]]) -> str:
    """As Markdown."""
    head = [
        "sampler",
        "label",
        "reference",
        "analytic, fp64",
        "network, fp32",
        "order",
        "NFE a step",
        "noise",
    ]
    body = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in body)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    write = parser.parse_args().write
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    text = table(rows(make_world()))
    print(text, end="")
    if write:
        page = PAGE.read_text(encoding="utf-8")
        between = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
        assert between.search(page), f"{PAGE} has no place for the table"
        PAGE.write_text(between.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
