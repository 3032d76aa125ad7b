"""Everything a run has in tensors, under names that say what they are, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdxl_cli.errors import FileError
from sdxl_cli.training.optimizers import RATE_SCALE
from sdxl_cli.training.state import State, read_state
from sdxl_cli.training.turns import Player
from sdxl_cli.training.world import ALONE, World


def snapshot(players: Sequence[Player], world: World = ALONE) -> dict[str, Tensor]:
    """Weights, buffers, optimizer state, averages and this process's random numbers, by name."""
    tensors: dict[str, Tensor] = {f"random.{name}": state for name, state in _random(world).items()}
    for player in players:
        tensors |= {f"weights.{name}": p.detach() for name, p in player.parameters.items()}
        tensors |= {f"buffers.{name}": b for name, b in player.buffers.items()}
        for name, p in player.parameters.items():
            for key, value in player.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        if player.ema:
            tensors |= {f"ema.{name}": value for name, value in player.ema.shadow.items()}
    return tensors


MOMENTS = {"adamw": 2.0, "prodigy": 2.0, "adamw8bit": 0.5}
"""What optimizers keep at least, in units of the weights."""


def least_size(players: Sequence[Player]) -> int:
    """Bytes that a snapshot will have, as far as is known before the first step."""
    return sum(
        int(
            p.numel() * p.element_size() * (1 + (player.ema is not None) + MOMENTS.get(player.config.name, 0))
        )
        for player in players
        for p in player.parameters.values()
    )


@torch.no_grad()
def restore(state: State, players: Sequence[Player], world: World = ALONE) -> None:
    """Put a snapshot and the :func:`numbers` that go with it back.

    Raises:
        FileError: the state does not have these parameters, at these shapes, or is of other optimizers.
    """
    saved = {n.removeprefix("weights."): s for n, s in state.shapes.items() if n.startswith("weights.")}
    ours = {name: tuple(p.shape) for player in players for name, p in player.parameters.items()}
    if saved != ours:
        world.fail(
            FileError("the saved state is of another model; start a new run in another --output folder")
        )
    for player, kept in zip(players, state.values["players"], strict=True):
        if wrong := _other_optimizer(player, kept):
            world.fail(FileError(wrong))
    tensors = {f"random.{n}": v for n, v in _random(world).items() if f"random.{n}" in state.shapes}
    for player in players:
        tensors |= _targets(state, player)
    read_state(state, tensors, world)
    for player, kept in zip(players, state.values["players"], strict=True):
        if wrong := _set_numbers(player.optimizer, kept):
            world.fail(FileError(wrong))
        if player.ema:
            player.ema.updates = kept["ema_updates"]
            for name, value in player.ema.shadow.items():
                if f"ema.{name}" not in tensors:  # the run has begun without
                    value.copy_(player.parameters[name])
    _set_random(tensors, world)


def _other_optimizer(player: Player, kept: Mapping[str, Any]) -> str | None:
    """What to do when the saved moments are another optimizer's; None when they are this one's."""
    ours = player.config.name
    saved = kept.get("optimizer", ours)
    if saved == ours:
        return None
    flag = (
        f'name = "{saved}" in the table of {player.turn.name}\'s optimizer'
        if player.turn.optimizer
        else f"--optimizer {saved}"
    )
    return (
        f"the saved state has the moments of {saved}, this run's optimizer is {ours}; give {flag}, "
        "or start a new run in another --output folder"
    )


def _targets(state: State, player: Player) -> dict[str, Tensor]:
    """Where the state of one player goes; room is made for the optimizer's."""
    tensors = {f"weights.{name}": p.detach() for name, p in player.parameters.items()}
    tensors |= {f"buffers.{name}": buffer for name, buffer in player.buffers.items()}
    if player.ema:
        shadow = player.ema.shadow.items()
        tensors |= {f"ema.{name}": value for name, value in shadow if f"ema.{name}" in state.shapes}
    for entry in state.shapes:
        if entry.startswith("optimizer."):
            _, key, name = entry.split(".", 2)
            if name in player.parameters:
                p = player.parameters[name]
                room = _room(player.optimizer, p, key, state.shapes[entry], state.dtypes[entry])
                player.optimizer.state[p][key] = tensors[entry] = room
    return tensors


def _random(world: World) -> dict[str, Tensor]:
    """The states of this process's own random numbers, on the CPU; the loop's are a function of the step."""
    states = {f"cpu.{world.rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda.{world.rank}"] = torch.cuda.get_rng_state()
    return states


def _set_random(tensors: Mapping[str, Tensor], world: World) -> None:
    if (cpu := tensors.get(f"random.cpu.{world.rank}")) is not None:
        torch.set_rng_state(cpu)
    if (cuda := tensors.get(f"random.cuda.{world.rank}")) is not None:
        torch.cuda.set_rng_state(cuda)


def numbers(players: Sequence[Player]) -> list[dict[str, Any]]:
    """What optimizers and averages remember in plain numbers: steps averaged, an optimizer's name and groups,
    and which entries of its state are such.

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
        "optimizer": player.config.name,
        "plain": sorted(plain),
        "groups": kept,
        "ema_updates": player.ema.updates if player.ema else 0,
    }


def _set_numbers(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> str | None:
    """The inverse of :func:`_numbers`; what is wrong with them, if anything is."""
    # what the configuration says is not the state's to say
    learned = [
        {key: value for key, value in kept.items() if key not in optimizer.defaults or key in _LEARNED}
        for kept in values["groups"]
    ]
    if any(learned):
        if len(learned) != len(optimizer.param_groups):
            return (
                f"the saved state has {len(learned)} groups of weights that share a rate and a decay, this run "
                f"{len(optimizer.param_groups)}; give the rates and the weight_decay that the run began with"
            )
        for group, kept in zip(optimizer.param_groups, learned, strict=True):
            group.update(kept)
    for state in optimizer.state.values():
        for key in values["plain"]:
            if key in state:
                state[key] = state[key].item()
    return None


_LEARNED = frozenset({"d", "d_max", "d_numerator", "k"})
"""Entries of Prodigy's groups that are named like settings and change as it runs."""


def _room(
    optimizer: torch.optim.Optimizer, parameter: Tensor, key: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Memory where the optimizer expects it, in the parameter's layout when it is of its shape.

    Fused steps walk through memory and look at no strides; they alone want the step on the device.
    """
    if shape == tuple(parameter.shape) and key != "step":
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    stays = key == "step" and not optimizer.defaults.get("fused")
    return torch.empty(shape, dtype=dtype, device="cpu" if stays else parameter.device)
