"""Everything a run has in tensors, under names that say what they are, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdxl_cli.errors import FileError
from sdxl_cli.training.optimizers import RATE_SCALE
from sdxl_cli.training.turns import Player


def snapshot(players: Sequence[Player]) -> dict[str, Tensor]:
    """Weights, buffers, optimizer state and averages by name."""
    tensors: dict[str, Tensor] = {}
    for player in players:
        tensors |= {f"weights.{name}": p.detach() for name, p in player.parameters.items()}
        tensors |= {f"buffers.{name}": b for name, b in player.buffers.items()}
        for name, p in player.parameters.items():
            for key, value in player.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        if player.ema:
            tensors |= {f"ema.{name}": value for name, value in player.ema.shadow.items()}
    return tensors


def restore(
    tensors: Mapping[str, Tensor], values: Sequence[Mapping[str, Any]], players: Sequence[Player]
) -> None:
    """Put a snapshot and the :func:`numbers` that go with it back.

    Raises:
        FileError: the state does not have these parameters, at these shapes.
    """
    saved = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    ours = {name: p for player in players for name, p in player.parameters.items()}
    if saved.keys() != ours.keys() or any(saved[n].shape != p.shape for n, p in ours.items()):
        raise FileError("the saved state is of another model; start a new run in another --output folder")
    found: dict[str, list[str]] = {}
    for entry in tensors:
        if entry.startswith("optimizer."):
            _, key, name = entry.split(".", 2)
            found.setdefault(name, []).append(key)
    for player, kept in zip(players, values, strict=True):
        _restore_one(tensors, found, player)
        _set_numbers(player.optimizer, kept)
        if player.ema:
            player.ema.updates = kept["ema_updates"]


@torch.no_grad()
def _restore_one(tensors: Mapping[str, Tensor], found: Mapping[str, Sequence[str]], player: Player) -> None:
    optimizer = player.optimizer
    for name, buffer in player.buffers.items():
        buffer.copy_(tensors[f"buffers.{name}"])
    for name, p in player.parameters.items():
        p.copy_(tensors[f"weights.{name}"])
        moments = {
            key: _placed(optimizer, p, key, tensors[f"optimizer.{key}.{name}"]) for key in found.get(name, [])
        }
        if moments:
            optimizer.state[p] = moments
        if player.ema:
            player.ema.shadow[name].copy_(tensors.get(f"ema.{name}", p))


def numbers(players: Sequence[Player]) -> list[dict[str, Any]]:
    """What optimizers and averages remember in plain numbers: steps averaged, an optimizer's groups, and which
    entries of its state are such.

    Prodigy keeps its estimate of the rate so; torch's optimizers keep nothing.
    """
    return [_numbers(player) for player in players]


def _numbers(player: Player) -> dict[str, Any]:
    optimizer = player.optimizer
    plain = {key for state in optimizer.state.values() for key, v in state.items() if not torch.is_tensor(v)}
    kept = [
        {
            key: value
            for key, value in group.items()
            if key not in ("lr", RATE_SCALE) and type(value) in (int, float)
        }
        for group in optimizer.param_groups
    ]
    return {
        "plain": sorted(plain),
        "groups": kept,
        "ema_updates": player.ema.updates if player.ema else 0,
    }


def _set_numbers(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    for group, kept in zip(optimizer.param_groups, values["groups"], strict=True):
        # what the configuration says is not the state's to say
        learned = {k: v for k, v in kept.items() if k not in optimizer.defaults or k in _LEARNED}
        group.update(learned)
    for state in optimizer.state.values():
        for key in values["plain"]:
            if key in state:
                state[key] = state[key].item()


_LEARNED = frozenset({"d", "d_max", "d_numerator", "k"})
"""Entries of Prodigy's groups that are named like settings and change as it runs."""


def _placed(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str, value: Tensor) -> Tensor:
    """A copy where the optimizer expects it, in the parameter's memory layout when it is of its shape.

    Fused steps walk through memory and look at no strides; they alone want the step on the device.
    """
    if value.shape == parameter.shape and key != "step":
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    stays = key == "step" and not optimizer.defaults.get("fused")
    return value.clone() if stays else value.to(parameter.device, copy=True)
