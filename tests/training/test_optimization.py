"""Averages, learning rates and what is decayed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import get_scheduler

from sdxl_cli.errors import UsageError
from sdxl_cli.training.config import LoopConfig, OptimizerConfig
from sdxl_cli.training.ema import EMA, swapped_in
from sdxl_cli.training.optimizers import build_optimizer
from sdxl_cli.training.rates import learning_rate


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


def test_the_average_is_that_of_diffusers() -> None:
    """Its first update takes the weights over whole; from the second on the two count the same steps."""
    module = nn.Linear(3, 2)
    peer = EMAModel(module.parameters(), decay=0.6)
    peer.optimization_step = 1
    ema = EMA(dict(module.named_parameters()), decay=0.6)
    for step in range(12):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * step + 0.3)
        peer.step(module.parameters())
        ema.update(dict(module.named_parameters()))
    for ours, theirs in zip(ema.shadow.values(), peer.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_an_average_of_every_third_step_remembers_as_long() -> None:
    """Weights that stand still are approached as fast; the steps since the last update are not lost."""
    start, end = torch.tensor([5.0]), {"p": torch.tensor([-1.0])}
    each, third = EMA({"p": start}, 0.7), EMA({"p": start}, 0.7, every=3)
    for step in range(1, 12):
        each.update(end)
        third.update(end)
        assert float(third.current(end)["p"]) == pytest.approx(float(each.shadow["p"]), rel=1e-5)
        assert (float(third.shadow["p"]) == float(third.current(end)["p"])) == (step % 3 == 0)


def test_weights_come_back_after_the_average_stood_in_for_them() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    with swapped_in({"weight": torch.ones(2, 2)}, dict(module.named_parameters())):
        assert module.weight.tolist() == [[1, 1], [1, 1]]
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize(
    ("name", "warmup", "extra"),
    [
        ("constant", 0, {}),
        ("constant_with_warmup", 5, {}),
        ("linear", 5, {}),
        ("cosine", 0, {}),
        ("cosine", 5, {}),
        ("cosine_with_restarts", 5, {"num_cycles": 3}),
        ("polynomial", 5, {"power": 2.0}),
    ],
)
def test_schedules_are_those_of_transformers(name: Any, warmup: int, extra: dict[str, Any]) -> None:
    """But for the warm-up, which begins one step later there: with a step at rate 0."""
    steps, highest = 23, 0.5
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=highest)
    takes_extra = {"scheduler_specific_kwargs": extra} if extra else {}
    peer = get_scheduler(name, optimizer, warmup, steps, **takes_extra)
    theirs = []
    for _ in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()
    config = OptimizerConfig(
        learning_rate=highest,
        schedule=name,
        warmup_steps=warmup,
        cycles=extra.get("num_cycles", 1),
        power=extra.get("power", 1.0),
    )
    ours = [learning_rate(config, step, steps) for step in range(steps)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-6)
    assert ours[:warmup] == pytest.approx([*theirs[1:warmup], highest][:warmup], rel=1e-6)
    assert name.startswith("constant") == (min(ours[warmup:]) == highest)


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "constant", "warmup_steps": 3},
        {"schedule": "cosine", "decay_steps": 3},
        {"warmup_steps": -1},
        {"learning_rate": 0.0},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.999)},
        {"eps": 0.0},
        {"weight_decay": -0.01},
        {"name": "prodigy", "learning_rate": 1e-4},
    ],
)
def test_rates_without_meaning_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        OptimizerConfig(**values)


def test_the_number_of_batches_makes_up_the_total() -> None:
    config = LoopConfig(batch_size=4, total_batch_size=48)
    assert (config.batches_per_step(), config.batches_per_step(3)) == (12, 4)
    assert LoopConfig(batch_size=4, accumulate=3).batches_per_step(5) == 3
    with pytest.raises(UsageError, match="48 is no multiple of batch_size 4 times 5 processes"):
        config.batches_per_step(5)
    with pytest.raises(UsageError, match="give one of them"):
        LoopConfig(total_batch_size=32, accumulate=2)


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes")])
def test_a_missing_package_is_named_with_what_installs_it(
    name: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    weight = nn.Parameter(torch.zeros(2, 2))
    if name == "adamw8bit":
        with pytest.raises(UsageError, match="CUDA devices only; use adamw"):
            build_optimizer({"weight": weight}, OptimizerConfig(name=name, learning_rate=1.0))
        monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda"), raising=False)
    with pytest.raises(UsageError, match=rf"needs {package}.*pip install 'sdxl-cli\[{name}\]'"):
        build_optimizer({"weight": weight}, OptimizerConfig(name=name, learning_rate=1.0))


def quadratic(name: Any, rate: float, steps: int) -> list[float]:
    """Distances from the minimum of a bowl, as an optimizer goes down it."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
    config = OptimizerConfig(name=name, learning_rate=rate, weight_decay=0.0)
    optimizer = build_optimizer({"weight": weight, "bias": bias}, config)
    losses = []
    for _ in range(steps):
        loss = weight.square().sum() + bias.square().sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "rate", "steps"), [("adamw", 0.05, 80), ("adafactor", 0.05, 80), ("prodigy", 1.0, 200)]
)
def test_every_optimizer_goes_down(
    name: str, rate: float, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    losses = quadratic(name, rate, steps)
    assert losses[-1] < 0.1 * losses[0]
    assert capsys.readouterr().out == "", "stdout is for results"


def test_prodigy_has_one_rate() -> None:
    weights = {name: nn.Parameter(torch.zeros(2, 2)) for name in ("a", "b")}
    config = OptimizerConfig(name="prodigy", learning_rate=1.0, rates={"a": 0.1})
    with pytest.raises(UsageError, match="prodigy finds one rate for all weights"):
        build_optimizer(weights, config)


def test_adafactor_keeps_a_row_and_a_column() -> None:
    weight = nn.Parameter(torch.randn(7, 5))
    optimizer = build_optimizer({"weight": weight}, OptimizerConfig(name="adafactor"))
    weight.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    sizes = sorted(tensor.numel() for tensor in optimizer.state[weight].values())
    assert sizes == [1, 5, 7]


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
    decayed, kept = build_optimizer(dict(module.named_parameters()), config).param_groups
    assert {id(p) for p in decayed["params"]} == {id(module[0].weight), id(module[2].weight)}
    assert len(kept["params"]) == 5
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    for group in (decayed, kept):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-7, 0.02)


def test_a_step_is_that_of_the_paper() -> None:
    """AdamW (arXiv 1711.05101, algorithm 2), written out."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    config = OptimizerConfig(learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    optimizer = build_optimizer({"weight": weight}, config)
    expected, m, v = weight.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        gradient = torch.tensor([[0.5, step]], dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        expected -= 0.1 * (update + 0.2 * expected)
        torch.testing.assert_close(weight.detach(), expected)
