"""Tensors that may be spread over processes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor

from sdxl_cli.training.world import World


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which may be all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes' parts; all call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors, in the leading process; the others help and get nothing where something was sharded."""
    found: dict[str, Tensor] = {}
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if world.leads or not sharded:
            found[name] = full
    return found
