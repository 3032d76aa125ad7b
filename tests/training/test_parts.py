"""Parts of a model have their own rates, and a part of rate 0 stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sdxl_cli.errors import UsageError
from sdxl_cli.training.config import OptimizerConfig
from sdxl_cli.training.state import load_state
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from tests.training.files import tensors
from tests.training.small import unet_config

PARTS = {
    "unet": "model.diffusion_model.",
    "clip_l": "conditioner.embedders.0.",
    "big_g": "conditioner.embedders.1.",
}


def moved(request: UNetRequest, base: Path) -> dict[str, float]:
    """How far a weight of each part went at most."""
    result, before = tensors(train_unet(request).path), tensors(base)
    return {
        part: max(
            float((result[name] - before[name]).abs().max())
            for name in before
            if name.startswith(prefix) and before[name].is_floating_point() and before[name].numel()
        )
        for part, prefix in PARTS.items()
    }


def test_the_first_step_of_adam_is_as_long_as_the_rate_of_the_part(
    request_: UNetRequest, base_file: Path
) -> None:
    rates = {"clip_l": 3e-5, "big_g": 0.0}
    optimizer = OptimizerConfig(learning_rate=1e-3, rates=rates, weight_decay=0.0, schedule="constant")
    config = unet_config(max_steps=1, ema_decay=0.0, optimizer=optimizer, text_dropout=0.0)
    asked = replace(request_, init=str(base_file), vae=None, config=config)
    assert moved(asked, base_file) == pytest.approx(
        {"unet": 1e-3, "clip_l": 3e-5, "big_g": 0.0}, rel=0.02, abs=0
    )
    state, _ = load_state(asked.output)
    assert not [name for name in state if PARTS["big_g"] in name], "what is not trained is not in the state"


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({"text_encoder": 1e-5}, "part in loop.optimizer.rates"),
        ({"unet": 0.0, "clip_l": 0.0, "big_g": 0.0}, "nothing to train"),
    ],
)
def test_rates_that_mean_nothing_are_refused(
    rates: dict[str, float], said: str, request_: UNetRequest
) -> None:
    config = unet_config(optimizer=OptimizerConfig(rates=rates))
    with pytest.raises(UsageError, match=said):
        train_unet(replace(request_, config=config))


def test_a_rate_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rates\.unet is -1"):
        OptimizerConfig(rates={"unet": -1.0})
