"""What was given and changes nothing is said."""

from __future__ import annotations

from sdxl_cli.generation.ineffective import ineffective
from sdxl_cli.generation.request import GenerateRequest


def test_a_way_to_use_no_refiner() -> None:
    (text,) = ineffective(GenerateRequest(prompt="x", refiner_mode="sdedit"))
    assert "--refiner-mode sdedit" in text
    assert "--refiner FILE" in text
    assert not list(ineffective(GenerateRequest(prompt="x", refiner_mode="sdedit", refiner="r")))


def test_a_negative_prompt_without_guidance() -> None:
    (text,) = ineffective(GenerateRequest(prompt="x", negative_prompt="y", cfg_scale=1.0))
    assert "--negative-prompt" in text
    assert not list(ineffective(GenerateRequest(prompt="x", negative_prompt="y", cfg_scale=5.0)))
    assert not list(
        ineffective(GenerateRequest(prompt="x", negative_prompt="y", cfg_scale=1.0, cfg_schedule="7,1"))
    )
