"""Steps inside the backward pass and weights in bf16, beside ordinary ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_cli.errors import UsageError
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.config import LoopConfig, OptimizerConfig
from sdxl_cli.training.ema import EMA
from sdxl_cli.training.loop import Run
from sdxl_cli.training.optimizers import build_optimizer
from sdxl_cli.training.rounding import round_into
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from sdxl_cli.training.unet_task import UNetTask
from sdxl_cli.training.updates import FusedUpdates, RoundedUpdates, Updates, build_updates
from tests.training.files import assert_same_bits, tensors
from tests.training.small import SMALL, unet_config
from tests.training.test_unet_task import Repeating, words

FREE = OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.0)


def trained(
    folder: Path, dtype: torch.dtype = torch.float32, **loop: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and moments after three steps, and the steps' gradient lengths."""
    torch.manual_seed(0)
    model = SDXL(SMALL, ("unet", "text")).to(dtype)
    low = "bf16" if dtype == torch.bfloat16 else "fp32"
    task = UNetTask(model, Repeating(), words, unet_config(weight_dtype=low, **loop))
    run = Run(task, task.config.loop, folder, {})
    norms = [run.advance(index)["grad_norm"] for index in range(3)]
    assert all(p.grad is None for p in model.parameters()) or not task.config.loop.fused_backward
    (player,) = run.players
    found = {name: p.detach() for name, p in player.parameters.items()}
    for name, p in player.parameters.items():
        for key, value in player.optimizer.state.get(p, {}).items():
            found[f"{key} {name}"] = torch.as_tensor(value)
    return found, norms


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_step_inside_the_backward_pass_is_the_ordinary_step(name: Any, tmp_path: Path) -> None:
    """To the bit: weights, moments and what the log says of the gradient (its sum may round elsewhere)."""
    optimizer = replace(FREE, name=name)
    ordinary, norms = trained(tmp_path, optimizer=optimizer)
    fused, others = trained(tmp_path, optimizer=optimizer, fused_backward=True)
    assert_same_bits(ordinary, fused)
    assert norms == pytest.approx(others, rel=1e-5)
    assert norms[0] > 0


def test_no_gradient_outlives_its_update() -> None:
    """At every moment of the backward pass at most one parameter has a gradient."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    parameters, most = list(layers.parameters()), 0
    updates = FusedUpdates(parameters, build_optimizer(dict(layers.named_parameters()), FREE), seed=0)

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in parameters))

    for layer in layers:
        layer.register_full_backward_hook(count)
    before = layers[0].get_parameter("weight").detach().clone()
    updates.begin(0, 1e-2)
    layers(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert most <= 1
    assert not torch.equal(before, layers[0].get_parameter("weight"))
    updates.close()
    layers(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert all(p.grad is not None for p in parameters), "closed, nothing is changed any more"


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_bf16_weights_are_the_same_inside_and_after_the_backward_pass(name: Any, tmp_path: Path) -> None:
    """Every weight has chances of its own in a step: the order in which gradients arrive makes no difference."""
    optimizer = replace(FREE, name=name)
    after, _ = trained(tmp_path, torch.bfloat16, optimizer=optimizer)
    inside, _ = trained(tmp_path, torch.bfloat16, optimizer=optimizer, fused_backward=True)
    assert_same_bits(after, inside)
    weights = [value for key, value in after.items() if " " not in key]
    moments = [value for key, value in after.items() if " " in key and not key.startswith("step ")]
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert {m.dtype for m in moments} == {torch.float32}


def test_rounding_is_right_on_average_and_never_farther_than_the_neighbours() -> None:
    values = torch.tensor([1.0, 1.001, -3.3e-5, 0.3333333, -1e20, 0.0, float("inf")])
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(4000):
        row = torch.empty(7, dtype=torch.bfloat16)
        round_into(row, values.clone(), generator)
        rows.append(row.double())
    seen, exact = torch.stack(rows), values.double()
    spacing = exact.abs() / 128
    assert bool(((seen - exact).abs() <= spacing)[:, :6].all())
    error = (seen.mean(0) - exact)[:6].abs()
    assert bool((error <= 5 * spacing[:6] / 4000**0.5).all())
    assert torch.equal(seen[:, [0, 5, 6]], exact[[0, 5, 6]].expand(4000, 3)), "what bf16 has stays"
    assert len(set(seen[:, 1].tolist())) == 2


def quadratic(weight: nn.Parameter, updates: Updates, steps: int) -> float:
    """Walk towards 1 and say how far it is on average at the end."""
    for step in range(steps):
        updates.begin(step, 1e-4)
        (weight.float() - 1).square().sum().backward()  # type: ignore[no-untyped-call]
        updates.norm(0.0)
        updates.apply()
    return float((weight.detach().float() - 1).abs().mean())


def test_small_steps_are_not_lost_in_bf16() -> None:
    """A weight of 0.75 has neighbours 0.004 away: rounded to the nearest, steps of 0.0001 would leave it there."""
    weight = nn.Parameter(torch.full((512,), 0.75, dtype=torch.bfloat16))
    optimizer = build_optimizer({"w": weight}, replace(FREE, weight_decay=0.0))
    distance = quadratic(weight, RoundedUpdates([weight], optimizer, seed=0), 500)
    assert distance == pytest.approx(0.2, abs=0.005)
    stuck = nn.Parameter(torch.full((512,), 0.75, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([stuck], lr=1e-4, weight_decay=0.0)
    assert quadratic(stuck, Updates([stuck], optimizer), 50) == 0.25


def test_gradients_of_bf16_weights_add_up_and_are_limited_in_fp32() -> None:
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    updates = RoundedUpdates([weight], build_optimizer({"w": weight}, FREE), seed=0)
    updates.begin(0, 1e-4)
    for part in (1.0, 2.0**-9, 2.0**-9, 2.0**-9):  # bf16 has nothing between 1 and 1 + 2**-7
        (weight * part).sum().backward()  # type: ignore[no-untyped-call]
    assert updates.sums[weight].unique().tolist() == [1 + 3 * 2.0**-9]
    assert float(updates.norm(0.5)) == pytest.approx(2 * (1 + 3 * 2.0**-9))
    assert float(updates.sums[weight].norm()) == pytest.approx(0.5, rel=1e-5)


def test_an_average_of_bf16_weights_is_fp32() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16)
    ema = EMA({"w": weight}, decay=0.9999)
    for _ in range(3):
        ema.update({"w": weight * 1.5})
    assert ema.shadow["w"].dtype == torch.float32
    shadow = 1.0
    for n in range(1, 4):
        shadow += (1 - min(0.9999, (1 + n) / (10 + n))) * (1.5 - shadow)
    assert ema.shadow["w"].tolist() == pytest.approx([shadow] * 3, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_in_bf16_goes_on_to_the_same_bits(request_: UNetRequest, tmp_path: Path, fused: bool) -> None:
    loop = {"fused_backward": fused, "optimizer": replace(FREE, warmup_steps=2)}

    def run(folder: Path, steps: int, resume: bool) -> Path:
        config = unet_config(max_steps=steps, weight_dtype="bf16", **loop)
        return train_unet(replace(request_, output=folder, config=config, resume=resume)).path

    whole = run(tmp_path / "whole", 4, False)
    run(tmp_path / "halves", 2, False)
    assert_same_bits(tensors(whole), tensors(run(tmp_path / "halves", 4, True)))


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({"fused_backward": True, "accumulate": 2, "optimizer": FREE}, "give --accumulate 1"),
        ({"fused_backward": True, "total_batch_size": 64, "optimizer": FREE}, "a step is to have 4"),
        ({"fused_backward": True, "optimizer": replace(FREE, max_grad_norm=1.0)}, "give --max-grad-norm 0"),
        (
            {"fused_backward": True, "optimizer": replace(FREE, name="prodigy", learning_rate=1.0)},
            "one by one",
        ),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(loop: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _build(loop)


def _build(loop: dict[str, Any]) -> Updates:
    config, weight = LoopConfig(**loop), nn.Parameter(torch.zeros(2))
    return build_updates([weight], torch.optim.SGD([weight]), config.optimizer, config)
