"""The processes of a run, as ``torchrun`` starts them, and what they agree on."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sdxl_cli.console import get as console
from sdxl_cli.errors import SdxlError, UsageError
from sdxl_cli.training.config import LoopConfig

T = TypeVar("T")

PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: pictures and validation are made by one while the others wait."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of its machine."""
    local_size: int = 1
    joined: bool = False
    """Whether the processes are connected; one alone need not be."""

    @property
    def leads(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for everybody."""
        self.gathered(None)

    def gathered(self, value: T) -> list[T]:
        """Everybody's value, in every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sums(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether it is so in some process: everybody gets the same answer."""
        return self.sums(float(value))[0] > 0

    def by_lead(self, work: Callable[[], T]) -> T:
        """What the leading process gets by ``work``, which the others do not do; its errors are everybody's.

        Raises:
            SdxlError: see :meth:`fail`.
        """
        if self.size == 1:
            return work()
        said: list[Any] = [None, None]
        if self.leads:
            try:
                said[0] = work()
            except SdxlError as error:
                said[1] = error
        dist.broadcast_object_list(said)
        if said[1] is not None:
            self.fail(said[1])
        return said[0]

    def fail(self, error: SdxlError) -> NoReturn:
        """Raise what all processes found together; one of them says it, all end with its exit code."""
        if self.leads:
            raise error
        raise SystemExit(error.exit_code)

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        """The block is run by the leading process, then by the others, who find what it left on the disk."""
        if self.leads:
            yield
        self.barrier()
        if not self.leads:
            yield


ALONE = World()


def restarted() -> bool:
    """Whether torchrun started this process in the place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def world_of(config: LoopConfig) -> Iterator[World]:
    """The processes that torchrun started, connected while the block runs; this one alone without torchrun.

    Raises:
        UsageError: several processes are asked for and torchrun did not start this one, or the device cannot be theirs.
    """
    world = _started()
    if world.size == 1 and config.distributed in ("auto", "off"):
        yield ALONE
        return
    _require(world, config)
    backend = "cpu:gloo,cuda:nccl" if _on_cuda(config) else "gloo"
    if _on_cuda(config):
        torch.cuda.set_device(world.local_rank)
    joins = not dist.is_initialized()  # a program that joined them itself goes on with them
    if joins:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group(
            backend, store=fresh(store, rank, size), rank=rank, world_size=size, timeout=PATIENCE
        )
    console().muted = not world.leads
    try:
        yield world
    finally:
        console().muted = False
        if joins:
            dist.destroy_process_group()


def fresh(store: Store, rank: int, size: int) -> Store:
    """The store where processes meet, under a name that this start of theirs alone has.

    torchrun's store outlives its processes: those that are started in the place of dead ones would find the dead ones'
    addresses in it. Rank 0 thinks of a name and hears from everybody; whoever took an old name for it is not answered,
    and looks again.
    """
    if rank == 0:
        name = secrets.token_hex(8)
        store.set("sdxl/name", name)
        for other in range(1, size):
            token = store.get(f"sdxl/{name}/{other}").decode()
            store.set(f"sdxl/{name}/{other}/{token}", "welcome")
        return PrefixStore(name, store)
    token = secrets.token_hex(8)
    while True:
        name = store.get("sdxl/name").decode()
        store.set(f"sdxl/{name}/{rank}", token)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            if store.check([f"sdxl/{name}/{rank}/{token}"]):
                return PrefixStore(name, store)
            time.sleep(0.02)


def _started() -> World:
    """What torchrun says in the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return ALONE
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return World(rank, size, local_rank, local_size, joined=True)


def _on_cuda(config: LoopConfig) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def _require(world: World, config: LoopConfig) -> None:
    if not world.joined:
        raise UsageError(
            f"--distributed {config.distributed} needs the processes of torchrun: "
            "torchrun --nproc-per-node N -m sdxl_cli train-unet …"
        )
    if config.distributed == "off":
        raise UsageError(
            f"torchrun started {world.size} processes; leave --distributed off out, or start one process"
        )
    if config.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device {config.device} cannot be shared by {world.size} processes; give cpu or cuda"
        )
    if _on_cuda(config) and torch.cuda.device_count() < world.local_size:
        raise UsageError(
            f"{world.local_size} processes have {torch.cuda.device_count()} CUDA devices here; "
            "start as many processes as there are devices, or give --device cpu"
        )
