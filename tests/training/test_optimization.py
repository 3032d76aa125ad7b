"""Averages, learning rates and what is decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdxl_cli.training.config import OptimizerConfig
from sdxl_cli.training.ema import EMA
from sdxl_cli.training.optimizers import build_adamw, learning_rate


def test_the_average_is_the_originals() -> None:
    """facts: d = min(decay, (1 + n) / (10 + n)), n from 1; shadow -= (1 - d) (shadow - p)."""
    values = [5.0, -1.0, 2.0, 8.0, 3.0, 3.0]
    ema = EMA({"p": torch.tensor([values[0]])}, decay=0.3)
    shadow = values[0]
    for n, value in enumerate(values[1:], 1):
        ema.update({"p": torch.tensor([value])})
        decay = min(0.3, (1 + n) / (10 + n))
        shadow -= (1 - decay) * (shadow - value)
        assert float(ema.shadow["p"]) == pytest.approx(shadow, rel=1e-6)


def test_the_average_is_a_copy_of_its_own() -> None:
    weight = torch.zeros(3)
    ema = EMA({"p": weight}, decay=0.9)
    weight += 1
    assert ema.shadow["p"].tolist() == [0, 0, 0]


def test_the_average_takes_any_memory_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 4, 3, 3, 3, generator=generator)
    ema = EMA({"p": start.to(memory_format=torch.channels_last)}, decay=0.5)
    ema.update({"p": target})
    torch.testing.assert_close(ema.shadow["p"], start.lerp(target, 1 - 2 / 11))


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, decay_steps=5)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:16] == [2.0] * 12
    assert rates[15:] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_the_rate_is_constant_unless_told() -> None:
    config = OptimizerConfig(learning_rate=3.0)
    assert {learning_rate(config, step, 10) for step in range(10)} == {3.0}


def test_biases_and_norms_are_not_decayed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 5))
    module.scale = nn.Parameter(torch.zeros(()))
    config = OptimizerConfig(weight_decay=0.3, betas=(0.8, 0.95), eps=1e-7, learning_rate=0.02)
    decayed, kept = build_adamw(module.parameters(), config).param_groups
    assert {id(p) for p in decayed["params"]} == {id(module[0].weight), id(module[2].weight)}
    assert len(kept["params"]) == 5
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    for group in (decayed, kept):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-7, 0.02)


def test_a_step_is_that_of_the_paper() -> None:
    """AdamW (arXiv 1711.05101, algorithm 2), written out."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    config = OptimizerConfig(learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    optimizer = build_adamw([weight], config)
    expected, m, v = weight.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        gradient = torch.tensor([[0.5, step]], dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        expected -= 0.1 * (update + 0.2 * expected)
        torch.testing.assert_close(weight.detach(), expected)
