"""``sdxl samplers``: the list people choose from."""

from __future__ import annotations

import json

import pytest

from sdxl_cli import cli
from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.samplers import SAMPLERS


def test_all_are_listed_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["samplers", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = [line.split()[0] for line in lines if line.strip()]
    assert set(SAMPLERS) | set(GRIDS) <= set(first)
    line = next(line for line in lines if line.startswith("dpmpp_2m_sde "))
    assert line.split("  ")[0] == "dpmpp_2m_sde"
    assert "DPM++ 2M SDE" in line
    assert "eta=1 s_noise=1 solver_type=midpoint" in line


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["samplers", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    samplers = {row["name"]: row for row in listed["samplers"]}
    assert samplers.keys() == SAMPLERS.keys()
    assert [row["name"] for row in listed["schedulers"]] == list(GRIDS)
    # DDIM adds no noise unless eta is raised; no limit is null in JSON
    assert (samplers["ddim"]["noise"], samplers["ddpm"]["noise"]) == ("none", "fresh")
    assert samplers["euler"]["options"]["s_tmax"] is None
