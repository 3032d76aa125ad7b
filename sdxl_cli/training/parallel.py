"""How the processes of a run share a network: each has it whole, or a part of every weight."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sdxl_cli.errors import UsageError
from sdxl_cli.training.config import LoopConfig
from sdxl_cli.training.ema import swapped_in
from sdxl_cli.training.shards import gathered
from sdxl_cli.training.world import World

T = TypeVar("T")

UNITS = ("TransformerBlock", "ResBlock", "CLIPEncoderLayer", "ResidualAttentionBlock")
"""Classes of modules that are called as a whole: their weights come together for that long only."""
SHARDED_OPTIMIZERS = ("adamw",)
"""Those whose step looks at one weight at a time. Prodigy adds up over all, Adafactor over rows and columns, and
bitsandbytes knows no shards."""


class Parallel(Protocol):
    """A network, shared."""

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)``, inside which the network may be used."""
        ...

    def adding_up(self, last: bool) -> AbstractContextManager[object]:
        """Around every batch of a step: gradients need to be the mean over processes after the last one only."""
        ...

    def shown(self, values: Mapping[str, Tensor]) -> AbstractContextManager[nn.Module | None]:
        """The network with other values for its parameters, in the leading process; None in the others."""
        ...


def parallel(module: nn.Module, config: LoopConfig, world: World, device: torch.device) -> Parallel:
    """Share the network as the configuration says.

    Raises:
        UsageError: what is asked for does not fit together.
    """
    kind = kind_of(config, world)
    if kind == "off":
        return Alone(module)
    if kind == "ddp":
        return Replicated(module, world)
    return Sharded(module, mesh_of(config, world, device), world, device)


def kind_of(config: LoopConfig, world: World) -> str:
    """off, ddp, fsdp or hsdp.

    Raises:
        UsageError: the optimizer cannot be sharded.
    """
    if not world.joined:
        return "off"
    kind = "ddp" if config.distributed == "auto" else config.distributed
    if kind in ("fsdp", "hsdp") and config.optimizer.name not in SHARDED_OPTIMIZERS:
        raise UsageError(
            f"optimizer {config.optimizer.name} needs whole weights, which {kind} shards; "
            "use adamw, or --distributed ddp"
        )
    return kind


def mesh_of(config: LoopConfig, world: World, device: torch.device) -> DeviceMesh:
    """All processes in a row, or with hsdp in rows of ``shard_size``.

    Raises:
        UsageError: they do not fill whole rows.
    """
    if config.distributed == "fsdp":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    width = config.shard_size or world.local_size
    if world.size % width:
        raise UsageError(f"shard_size {width} does not divide {world.size} processes")
    shape = (world.size // width, width)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


class Alone:
    """One process has it all."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """See :class:`Parallel`."""
        return function(*args)

    def adding_up(self, last: bool) -> AbstractContextManager[object]:
        """See :class:`Parallel`."""
        return nullcontext()

    def shown(self, values: Mapping[str, Tensor]) -> AbstractContextManager[nn.Module | None]:
        """See :class:`Parallel`."""
        return _swapped(self.module, values)


class _Within(nn.Module):
    """A network as the part of a module whose forward is any function: the losses of a task use several methods of
    the network, and both kinds of sharing look at one call.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)


class _Trained(nn.Module):
    """The same with those of its weights that change. Others may be elsewhere, and of another type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList(p for p in module.parameters() if p.requires_grad)
        kept = module.state_dict(keep_vars=True).keys()
        for number, buffer in enumerate(b for name, b in module.named_buffers() if name in kept):
            self.register_buffer(f"running_{number}", buffer)

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)


class Replicated:
    """Every process has it all, and gradients are averaged while they are computed (DDP)."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self.module, self.world = module, world
        # the last layers of text encoders have no part in the loss: their gradients stay missing, as in one process
        self.shared = DistributedDataParallel(
            _Trained(module), find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """See :class:`Parallel`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)
            return self.shared(function, *args)

    def adding_up(self, last: bool) -> AbstractContextManager[object]:
        """See :class:`Parallel`."""
        return nullcontext() if last else self.shared.no_sync()

    def shown(self, values: Mapping[str, Tensor]) -> AbstractContextManager[nn.Module | None]:
        """See :class:`Parallel`."""
        return _swapped(self.module, values) if self.world.leads else nullcontext()


class Sharded:
    """Every process has a part of each weight, of its gradient, its moments and its average (FSDP2).

    Gradients are reduced after every batch of a step: to add them up unreduced would take the memory that sharding
    saves.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh, world: World, device: torch.device) -> None:
        self.module, self.world = module, world
        self._plain = _skeleton(module)
        module.to(memory_format=torch.contiguous_format)  # rows of a weight are dealt out
        with _without_scalars(module, device):
            for unit in module.modules():
                if type(unit).__name__ in UNITS:
                    fully_shard(unit, mesh=mesh)
            self.shared: nn.Module = _Within(module)
            fully_shard(self.shared, mesh=mesh)  # in place

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """See :class:`Parallel`."""
        return self.shared(function, *args)

    def adding_up(self, last: bool) -> AbstractContextManager[object]:
        """See :class:`Parallel`."""
        return nullcontext()

    @contextmanager
    def shown(self, values: Mapping[str, Tensor]) -> Iterator[nn.Module | None]:
        """See :class:`Parallel`. The leading process gathers a plain copy for as long."""
        state = gathered({**self.module.state_dict(), **values}, self.world)
        if not self.world.leads:
            yield None
            return
        device = next(iter(state.values())).device
        self._plain.load_state_dict(state, strict=False, assign=True)
        for name, buffer in self.module.named_buffers():
            if name not in state:
                owner, _, leaf = name.rpartition(".")
                setattr(self._plain.get_submodule(owner), leaf, buffer.to(device))
        try:
            yield self._plain
        finally:
            self._plain.to("meta")


@contextmanager
def _without_scalars(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Numbers have no rows to deal out: every process keeps them. CLIP's ``logit_scale`` is one, and takes no part."""
    scalars = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner.named_parameters(recurse=False)
        if p.ndim == 0
    ]
    for owner, name, _ in scalars:
        delattr(owner, name)
    yield
    for owner, name, p in scalars:
        p.data = p.data.to(device)
        owner.register_parameter(name, p)


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy without the parameters' memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


@contextmanager
def _swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    with swapped_in(values, dict(module.named_parameters())):
        yield module
