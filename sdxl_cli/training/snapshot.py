"""Everything a run has in tensors, under names that say what they are, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_cli.errors import FileError
from sdxl_cli.training.ema import EMA
from sdxl_cli.training.optimizers import RATE_SCALE


def snapshot(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, Tensor]:
    """Weights, optimizer state and averages by name."""
    tensors = {f"weights.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    if ema:
        tensors |= {f"ema.{name}": value for name, value in ema.shadow.items()}
    return tensors


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
) -> None:
    """Put a snapshot back.

    Raises:
        FileError: the state does not have these parameters, at these shapes.
    """
    saved = {n.removeprefix("weights.") for n in tensors if n.startswith("weights.")}
    if saved != set(parameters) or any(
        tensors[f"weights.{n}"].shape != p.shape for n, p in parameters.items()
    ):
        raise FileError("the saved state is of another model; start a new run in another --output folder")
    found: dict[str, list[str]] = {}
    for entry in tensors:
        if entry.startswith("optimizer."):
            _, key, name = entry.split(".", 2)
            found.setdefault(name, []).append(key)
    for name, p in parameters.items():
        p.copy_(tensors[f"weights.{name}"])
        moments = {
            key: _placed(optimizer, p, key, tensors[f"optimizer.{key}.{name}"]) for key in found.get(name, [])
        }
        if moments:
            optimizer.state[p] = moments
        if ema:
            ema.shadow[name].copy_(tensors.get(f"ema.{name}", p))


def numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer remembers in plain numbers: of its groups, and which entries of the state are such.

    Prodigy keeps its estimate of the rate so; torch's optimizers keep nothing.
    """
    plain = {key for state in optimizer.state.values() for key, v in state.items() if not torch.is_tensor(v)}
    kept = [
        {
            key: value
            for key, value in group.items()
            if key not in ("lr", RATE_SCALE) and type(value) in (int, float)
        }
        for group in optimizer.param_groups
    ]
    return {"plain": sorted(plain), "groups": kept}


def set_numbers(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """The inverse of :func:`numbers`, after :func:`restore`."""
    for group, kept in zip(optimizer.param_groups, values.get("groups", []), strict=False):
        # what the configuration says is not the state's to say
        learned = {k: v for k, v in kept.items() if k not in optimizer.defaults or k in _LEARNED}
        group.update(learned)
    for state in optimizer.state.values():
        for key in values.get("plain", []):
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
