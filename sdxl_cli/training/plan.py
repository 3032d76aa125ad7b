"""Which activations are kept, decided by what a step would need and what is free."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sdxl_cli.console import Cell
from sdxl_cli.console import get as console
from sdxl_cli.generation.residency import free_bytes
from sdxl_cli.model.live_bytes import LiveBytes
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.footprint import Footprint, resident
from sdxl_cli.training.parallel import Alone
from sdxl_cli.training.place import compute_dtype
from sdxl_cli.training.recompute import Recompute, recompute
from sdxl_cli.training.turns import Player, Turn
from sdxl_cli.training.unet_task import UNetTask
from sdxl_cli.training.updates import FusedUpdates, OneByOne

MODES: tuple[Recompute, ...] = get_args(Recompute)
AT_MOST = 4 * (1 + 4 + 1)
"""Bytes per trained value: a gradient, four moments, an average, in fp32."""
MARGIN = 0.95
"""Of free memory that a plan may fill: allocators lose some, and libraries take workspace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What training needs with one ``--memory``."""

    memory: Recompute
    footprint: Footprint
    total: int
    """The most bytes at once in all."""


def counted(task: UNetTask, device: torch.device, text_stays: bool = True) -> Iterator[Row]:
    """The bytes of a step with each ``--memory``, from the fastest to the smallest; each takes seconds to count.

    Args:
        task: with the largest batch; its model, on any device, is not touched.
        device: where the step would be made.
        text_stays: whether the text encoders are there, too, or gone as all captions have been read.
    """
    twin = _twin(task, device)
    model, config = twin.module, twin.config.loop
    # an average on the CPU takes nothing of the device
    on_device = config if config.ema_device == "same" else replace(config, ema_decay=0.0)
    player = Player(Turn("", model, twin.step), on_device, Alone(model))
    kept = _states(player)
    update = _update(player)
    if isinstance(player.updates, FusedUpdates):
        player.updates.close()
        for p in player.parameters.values():
            # the update's bytes are known: enough that the gradient goes
            p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda arrived: setattr(arrived, "grad", None)
            )
    for mode in MODES:
        recompute(model.unet, mode, twin.computing)
        activations, passes = _passes(twin, player)
        footprint = Footprint(
            weights=_there(model, text_stays),
            optimizer=kept,
            average=_bytes(player.ema.shadow.values()) if player.ema else 0,
            activations=activations,
            step=passes + update,
        )
        yield Row(memory=mode, footprint=footprint, total=footprint.total)


def _twin(task: UNetTask, device: torch.device) -> UNetTask:
    """The task on the meta device, computing in what it would on ``device``."""
    config = task.config
    low = config.weight_dtype == "bf16" or compute_dtype(config.loop, device) == torch.bfloat16
    explicit = replace(config, loop=replace(config.loop, dtype="bf16" if low else "fp32"))
    return replace(task, module=on_meta(task.module), config=explicit)


def on_meta(model: SDXL) -> SDXL:
    """A copy of a model without its numbers: same layers, types, memory layouts, and the same ones trained."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor.detach(), device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def _there(model: SDXL, text_stays: bool) -> int:
    return resident(model) - (0 if text_stays else resident(model.conditioner))


def _states(player: Player) -> int:
    """Bytes of the optimizer's moments, which a first step makes."""
    parameters = list(player.parameters.values())
    with LiveBytes():
        for p in parameters:
            p.grad = torch.empty_like(p, dtype=torch.float32) if p.dtype == torch.float32 else None
            if p.grad is None:
                assert isinstance(player.updates, OneByOne)
                player.updates.step(p, torch.empty_like(p))
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
    values = (v for state in player.optimizer.state.values() for v in state.values())
    return _bytes(v for v in values if torch.is_tensor(v))


def _update(player: Player) -> int:
    """Bytes at hand while the largest weight is changed."""
    largest = max(player.parameters.values(), key=torch.Tensor.numel)
    gradient = torch.empty_like(largest)
    with LiveBytes() as live:
        if isinstance(player.updates, OneByOne):
            player.updates.step(largest, gradient)
        else:
            largest.grad = gradient
            player.optimizer.step()
            largest.grad = None
    return live.peak


def _passes(task: UNetTask, player: Player) -> tuple[int, int]:
    """Bytes kept at the end of a forward pass, and the most at once of a step's passes."""
    updates = player.updates
    with LiveBytes() as live:
        updates.begin(0, 1.0)
        for _ in range(min(2, task.config.loop.batches_per_step())):
            before = live.now
            loss = task.loss(0, torch.Generator())
            activations = live.now - before
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        updates.drop()
    return activations, live.peak


def kept(task: UNetTask) -> int:
    """Bytes that a forward pass saves for the backward one, on the meta device; weights are not among them."""
    known = {t.untyped_storage()._cdata for t in (*task.module.parameters(), *task.module.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task.loss(0, torch.Generator())
    return _bytes(tensor for key, tensor in saved.items() if key not in known)


def _at_most(task: UNetTask, device: torch.device, text_stays: bool) -> int:
    """Bytes that training cannot exceed without recomputation, found in a moment: no optimizer keeps more."""
    twin = _twin(task, device)
    trained = sum(p.numel() for p in twin.module.parameters() if p.requires_grad)
    return _there(twin.module, text_stays) + trained * AT_MOST + 2 * kept(twin)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def settle(task: UNetTask, device: torch.device, text_stays: bool = True) -> Recompute:
    """The first ``--memory`` that fits what is free; the smallest, with a warning, when none does.

    Args:
        task: with the largest batch, its model not yet on ``device``, if that is a GPU.
        device: where it will train.
        text_stays: as for :func:`counted`.
    """
    asked = task.config.memory
    if asked != "auto":
        return asked
    free = free_bytes(device)
    if free is None:
        console().note("--memory none: nobody says how much memory is free")
        return "none"
    there = _there(task.module, text_stays) if device.type == "cpu" else 0
    if _at_most(task, device, text_stays) - there <= MARGIN * free:
        return "none"
    row = None
    for row in counted(task, device, text_stays):
        needed = row.total - there
        if needed <= MARGIN * free:
            if row.memory != "none":
                console().note(f"--memory {row.memory}: {_size(needed)} of {_size(free)} free")
            return row.memory
    assert row is not None
    console().warn(
        f"training needs {_size(needed)} even with --memory {row.memory}, and {_size(free)} are free; it may run out"
    )
    return row.memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What ``--plan`` says."""

    size: str
    """WxH in pixels."""
    batch_size: int
    device: str
    free: int | None
    """Bytes on the device; None where nobody says."""
    auto: Recompute | None
    """What ``--memory auto`` takes on a device with so much free; None where even the smallest does not fit."""
    rows: tuple[Row, ...]
    """From the fastest to the smallest."""


def plan(task: UNetTask, device: torch.device, size: str, text_stays: bool) -> Plan:
    """Count every ``--memory``.

    Args:
        task: as for :func:`counted`.
        device: where it would train.
        size: of the pictures, for people.
        text_stays: as for :func:`counted`.
    """
    rows = tuple(console().progress(counted(task, device, text_stays), "counting", total=len(MODES)))
    free = free_bytes(device)
    fitting = (row.memory for row in rows if free is None or row.total <= MARGIN * free)
    return Plan(
        size=size,
        batch_size=task.config.loop.batch_size,
        device=str(device),
        free=free,
        auto=next(fitting, None),
        rows=rows,
    )


def memory_table(planned: Plan) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows for people, in GB of 10⁹ bytes."""
    columns = ["--memory", "weights", "optimizer", "average", "activations", "step", "total"]
    rows: list[list[Cell]] = []
    for row in planned.rows:
        found = row.footprint
        parts = (found.weights, found.optimizer, found.average, found.activations, found.step, row.total)
        rows.append([row.memory, *(f"{value / 1e9:.2f}" for value in parts)])
    return columns, rows


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
