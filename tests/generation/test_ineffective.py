"""What was given and changes nothing is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_cli import cli
from sdxl_cli.generation.ineffective import ineffective
from sdxl_cli.generation.request import GenerateRequest


def test_a_way_to_use_no_refiner() -> None:
    (text,) = ineffective(GenerateRequest(prompt="x", refiner_mode="sdedit"))
    assert "--refiner-mode sdedit" in text
    assert "--refiner FILE" in text
    assert not list(ineffective(GenerateRequest(prompt="x", refiner_mode="sdedit", refiner="r")))


def test_packed_layers_where_layers_come_and_go_or_are_compiled() -> None:
    for more, flag in (({"compile": True}, "--compile"), ({"vram": "low"}, "--vram low")):
        (text,) = ineffective(GenerateRequest(prompt="x", prepack="on", **more))  # type: ignore[arg-type]
        assert text == f"--prepack on changes nothing with {flag}"
        assert not list(ineffective(GenerateRequest(prompt="x", **more)))  # type: ignore[arg-type]
    assert not list(ineffective(GenerateRequest(prompt="x", prepack="on")))


def test_a_number_of_steps_beside_levels_given_one_by_one() -> None:
    """The plan has as many steps as there are levels; who said so said nothing wrong."""
    for flag in ("sigmas", "timesteps"):
        planned = GenerateRequest(prompt="x", steps=3, **{flag: "9,5,1"})  # type: ignore[arg-type]
        (text,) = ineffective(planned, 20)
        assert text == f"--steps 20 changes nothing beside --{flag}, which make 3 steps; leave one out"
        assert not list(ineffective(planned, 3))
        assert not list(ineffective(planned))
    assert not list(ineffective(GenerateRequest(prompt="x", steps=3), 3))


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["--sigmas", "9,5,1,0", "--steps", "20"], True),
        (["--sigmas", "9,5,1", "--set", "steps=20"], True),
        (["--timesteps", "900,500", "--steps", "2"], False),
        (["--sigmas", "9,5,1"], False),
        (["--steps", "20"], False),
    ],
)
def test_the_command_says_so(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], flags: list[str], warned: bool
) -> None:
    assert cli.run(["generate", "x", "-m", str(models["base"]), "--plan", *flags]) == 0
    assert ("changes nothing beside" in capsys.readouterr().err) is warned


def test_a_negative_prompt_without_guidance() -> None:
    (text,) = ineffective(GenerateRequest(prompt="x", negative_prompt="y", cfg_scale=1.0))
    assert "--negative-prompt" in text
    assert not list(ineffective(GenerateRequest(prompt="x", negative_prompt="y", cfg_scale=5.0)))
    assert not list(
        ineffective(GenerateRequest(prompt="x", negative_prompt="y", cfg_scale=1.0, cfg_schedule="7,1"))
    )
