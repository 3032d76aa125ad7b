"""A run's processes, its part of the data and what it goes on from: all that is known before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdxl_cli.errors import UsageError
from sdxl_cli.training.config import LoopConfig
from sdxl_cli.training.folder import prepare
from sdxl_cli.training.parallel import kind_of
from sdxl_cli.training.place import training_device
from sdxl_cli.training.state import State
from sdxl_cli.training.trackers import require_trackers
from sdxl_cli.training.world import ALONE, World, world_of


@dataclass(frozen=True, slots=True)
class Share:
    """How the pictures of a batch are dealt out.

    A batch is ``batch_size`` pictures for every process that the run began with. A run that goes on with more or fewer
    processes keeps its batches: each process gets its share of one, in as many parts as fit through the network.
    """

    rank: int = 0
    processes: int = 1
    began_with: int = 1
    """Processes that a batch is made for."""
    parts: int = 1

    @property
    def hands(self) -> int:
        """Into how many a batch is dealt out."""
        return self.processes * self.parts

    def mine(self, index: int) -> slice:
        """Which pictures of the whole batch are in this process's part number ``index``, counted from the start."""
        return slice(index % self.parts * self.processes + self.rank, None, self.hands)


ALL = Share()
"""One process has everything."""


def share_of(config: LoopConfig, world: World, saved: dict[str, Any] | None) -> Share:
    """What to do, given what a state says of the run that wrote it."""
    began_with = world.size
    if saved and all(saved[key] == value for key, value in batching(config).items()):
        began_with = saved["began_with"]
    parts = -(-began_with // world.size)
    return Share(world.rank, world.size, began_with, parts)


def batching(config: LoopConfig) -> dict[str, int]:
    """What a step is made of: who changes it changes the run."""
    return {key: getattr(config, key) for key in ("batch_size", "accumulate", "total_batch_size")}


@dataclass(frozen=True, slots=True)
class Session:
    """See the module."""

    device: torch.device
    """Where this process computes."""
    world: World = ALONE
    share: Share = ALL
    state: State | None = None
    """What the run goes on from."""
    sharded: bool = False
    """Whether the network's weights will be sharded; they then stay on the CPU until they are."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The whole configuration of the run, for who compares runs."""

    @property
    def home(self) -> torch.device:
        """Where a network that is to be trained waits for that."""
        return torch.device("cpu") if self.sharded else self.device

    def dealing(self, config: LoopConfig) -> dict[str, Any]:
        """Arguments of :class:`~sdxl_cli.data.loader.BatchLoader` that give it this process's pictures."""
        share = self.share
        return {
            "rank": share.rank,
            "world_size": share.processes,
            "together": config.batch_size * share.began_with,
            "parts": share.parts,
        }

    def said(self, config: LoopConfig) -> dict[str, int]:
        """For the state: what :func:`share_of` wants to know."""
        return {**batching(config), "began_with": self.share.began_with}


@contextmanager
def session(folder: Path, config: Any, *, resume: bool, shards: bool = True) -> Iterator[Session]:
    """Join the processes that torchrun started, if it did, and open the run's folder.

    Args:
        folder: of the run.
        config: the whole configuration, with ``loop``.
        resume: go on from the state in the folder. A process that torchrun started anew does so by itself.
        shards: whether what is trained can be sharded.

    Raises:
        UsageError, FileError: see :func:`~sdxl_cli.training.folder.prepare` and
            :func:`~sdxl_cli.training.world.world_of`.
    """
    loop: LoopConfig = config.loop
    if not shards and loop.distributed in ("fsdp", "hsdp"):
        raise UsageError(
            f"--distributed {loop.distributed} shards a whole U-Net; here is little to shard, use ddp"
        )
    require_trackers(loop.log_to)
    with world_of(loop) as world:
        device = training_device(loop)
        if world.joined and device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
        kind = kind_of(loop, world)
        state = prepare(folder, config, resume=resume, world=world)
        share = share_of(loop, world, state.values.get("share") if state else None)
        yield Session(device, world, share, state, sharded=kind in ("fsdp", "hsdp"), settings=asdict(config))
