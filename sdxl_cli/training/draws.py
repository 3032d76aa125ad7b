"""Random numbers of a batch: a stream for every picture, so that it does not matter which process has it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Streams = Sequence[torch.Generator]
"""One for each picture of a batch."""


def streams(generator: torch.Generator, places: Sequence[int]) -> Streams:
    """A stream for each of these places in a batch, as functions of the batch's own seed and the place."""
    return [torch.Generator("cpu").manual_seed(_seed(generator.initial_seed(), place)) for place in places]


def each(streams: Streams, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
    """What ``draw`` gives for each picture [1, …], together [B, …]."""
    return torch.cat([draw(stream) for stream in streams])


def _seed(batch: int, place: int) -> int:
    # torch's generator on the CPU takes 32 bits of it
    return int.from_bytes(hashlib.blake2b(f"{batch}\n{place}".encode(), digest_size=4).digest(), "little")
