"""What is kept for the backward pass: the same numbers whatever it is, and as many bytes as were counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_cli import cli
from sdxl_cli.model.live_bytes import LiveBytes
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.unet import FeedForward, ResBlock, TransformerBlock
from sdxl_cli.training import plan as plans
from sdxl_cli.training.config import LoopConfig, OptimizerConfig
from sdxl_cli.training.measuring import LargestBatch
from sdxl_cli.training.optimizers import build_optimizer
from sdxl_cli.training.plan import MODES, Row, counted, kept, on_meta, settle
from sdxl_cli.training.recompute import Recompute, recompute
from sdxl_cli.training.unet_task import UNetTask
from tests.training.small import SMALL, unet_config
from tests.training.test_unet_task import Repeating, words

CPU = torch.device("cpu")


def make_task(batches: Any = None, **changes: Any) -> UNetTask:
    torch.manual_seed(0)
    model = SDXL(SMALL, ("unet", "text"))
    return UNetTask(model, batches or Repeating(), words, unet_config(**changes))


def gradients(task: UNetTask) -> dict[str, Tensor]:
    torch.manual_seed(5)
    task.module.zero_grad()
    loss = task.step(0, torch.Generator().manual_seed(0))[0]
    loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad for n, p in task.module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("mode", ["ff", "blocks", "all"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_losses_and_gradients_do_not_depend_on_what_is_kept(mode: Recompute, dtype: Any) -> None:
    """To the bit; with something random in every layer, which must fall the same way the second time."""
    task = make_task(dtype=dtype)
    for module in task.module.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    task.module.train()
    plain = gradients(task)
    state = torch.get_rng_state()
    recompute(task.module, mode)
    again = gradients(task)
    assert torch.equal(state, torch.get_rng_state())
    assert len(plain) > 200
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []


@pytest.mark.parametrize(
    ("mode", "classes"),
    [
        ("none", ()),
        ("ff", (FeedForward,)),
        ("blocks", (TransformerBlock,)),
        ("all", (TransformerBlock, ResBlock)),
    ],
)
def test_what_is_named_runs_twice_and_nothing_else(
    mode: Recompute, classes: tuple[type[nn.Module], ...]
) -> None:
    task = make_task()
    recompute(task.module, "all")
    recompute(task.module, mode)
    calls: Counter[str] = Counter()
    for name, module in task.module.unet.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d | nn.Dropout):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    gradients(task)
    tops = [f"{n}." for n, m in task.module.unet.named_modules() if classes and isinstance(m, classes)]
    assert len(calls) > 80
    assert [n for n, count in calls.items() if count != (2 if n.startswith(tuple(tops)) else 1)] == []
    names = set(task.module.state_dict())
    assert names == set(SDXL(SMALL, ("unet", "text")).state_dict())


def rows(task: UNetTask) -> dict[str, Row]:
    return {row.memory: row for row in counted(task, CPU)}


@pytest.fixture(scope="module")
def all_rows() -> dict[str, Row]:
    """Of pictures so large that activations outweigh gradients; on the meta device size costs no time."""
    return rows(make_task(LargestBatch((512, 512), 2, SMALL.vae)))


def test_each_mode_needs_less_than_the_one_before(all_rows: dict[str, Row]) -> None:
    kept_bytes = [all_rows[mode].footprint.activations for mode in MODES]
    totals = [all_rows[mode].total for mode in MODES]
    for sizes in (kept_bytes, totals):
        assert sizes == sorted(set(sizes), reverse=True)


def test_what_is_counted_is_what_autograd_saves() -> None:
    """Two ways to count on the meta device, and the bytes that a real forward pass saves on the CPU."""
    task = make_task(LargestBatch((64, 64), 2, SMALL.vae), dtype="fp32")
    task.module.conditioner.requires_grad_(False)
    found = next(counted(task, CPU)).footprint.activations
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    known = {t.untyped_storage().data_ptr() for t in (*task.module.parameters(), *task.module.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task.loss(0, torch.Generator())
    real = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in known)
    twin = UNetTask(on_meta(task.module), task.batches, words, task.config)
    assert kept(twin) == real
    assert real == pytest.approx(found, abs=64), "but for the loss itself"


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy"])
def test_counted_moments_are_those_that_an_optimizer_has(name: Any) -> None:
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    optimizer = OptimizerConfig(name=name, learning_rate=1.0)
    task = make_task(LargestBatch((64, 64), 1, SMALL.vae), optimizer=optimizer, memory="none")
    found = next(counted(task, CPU)).footprint
    parameters = {n: p for n, p in task.module.named_parameters() if p.requires_grad}
    real = build_optimizer(parameters, optimizer)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    real.step()
    values = [v for state in real.state.values() for v in state.values() if torch.is_tensor(v)]
    assert found.optimizer == pytest.approx(sum(v.nbytes for v in values), rel=0.01)
    assert found.weights == sum(t.nbytes for t in (*task.module.parameters(), *task.module.buffers()))
    assert found.average == sum(p.nbytes for p in parameters.values())


def test_a_fused_step_needs_no_room_for_gradients() -> None:
    batch = LargestBatch((64, 64), 1, SMALL.vae)
    free = OptimizerConfig(max_grad_norm=0.0)
    whole = next(counted(make_task(batch, optimizer=free), CPU)).footprint
    fused = next(counted(make_task(batch, optimizer=free, fused_backward=True), CPU)).footprint
    assert whole.step - fused.step > 0.5 * whole.weights, "gradients are as large as weights"
    assert replace(whole, step=0) == replace(fused, step=0)


def test_bytes_that_live_at_once_are_counted() -> None:
    x = torch.empty(100, device="meta")
    with LiveBytes() as live:
        y = x + 1
        z = y.view(10, 10)
        assert live.now == 400
        del y
        assert live.now == 400, "the view keeps it"
        (z + 1).sum()
        assert (live.now, live.peak) == (400, 804)
        del z
        assert live.now == 0


def test_auto_takes_the_fastest_that_fits(
    all_rows: dict[str, Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_task(LargestBatch((512, 512), 2, SMALL.vae), memory="auto")
    monkeypatch.setattr(plans, "counted", lambda *_: iter(all_rows.values()))
    there = plans.resident(task.module)  # on the CPU the weights have their room already
    for mode in MODES:
        enough = round((all_rows[mode].total - there) / plans.MARGIN) + 1
        monkeypatch.setattr(plans, "free_bytes", lambda device, enough=enough: enough)
        assert settle(task, CPU) == mode
    monkeypatch.setattr(plans, "free_bytes", lambda device: 1000)
    assert settle(task, CPU) == "all"
    assert "even with --memory all" in capsys.readouterr().err
    assert settle(replace(task, config=replace(task.config, memory="ff")), CPU) == "ff"
    monkeypatch.setattr(plans, "counted", lambda *_: pytest.fail("plenty is seen without counting it all"))
    monkeypatch.setattr(plans, "free_bytes", lambda device: 1 << 40)
    assert settle(task, CPU) == "none"


@pytest.mark.slow
def test_a_plan_of_the_released_size_meets_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    """A full fine-tune in bf16 at 1024 pixels, batch 1, within 10 GB."""
    assert cli.run(["train-unet", "--preset", "finetune-10gb", "--plan", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["size"], found["batch_size"]) == ("1024x1024", 1)
    parts = {row["memory"]: row["footprint"] for row in found["rows"]}
    totals = {row["memory"]: row["total"] for row in found["rows"]}
    assert totals["blocks"] < 8e9
    assert totals["all"] < 7.5e9
    assert parts["none"]["weights"] == pytest.approx(2 * 2567.46e6, rel=1e-4), (
        "features of captions are cached"
    )
    # 5.7, 3.3, 1.1 and 0.6 GiB: those of diffusers' U-Net, without gelu(gate), which we compute again anyway
    kept_bytes = {mode: part["activations"] / 2**30 for mode, part in parts.items()}
    assert kept_bytes == pytest.approx({"none": 5.67, "ff": 3.33, "blocks": 1.14, "all": 0.57}, abs=0.02)


@pytest.mark.slow
def test_a_plan_of_a_lora_meets_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA at 1024 pixels, batch 1, within 8 GB."""
    assert cli.run(["train-unet", "--preset", "lora", "--dtype", "bf16", "--plan", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    totals = {row["memory"]: row["total"] for row in found["rows"]}
    assert totals["all"] < totals["blocks"] < 8e9
    weights = found["rows"][0]["footprint"]["weights"]
    assert 2 * 2567.46e6 < weights < 2 * 2567.46e6 * 1.05, "matrices in bf16, adapters and norms in fp32"


def test_precisions_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(Exception, match="give --dtype bf16 or leave it out"):
        unet_config(weight_dtype="bf16", dtype="fp32")
    assert LoopConfig().fused_backward is False
