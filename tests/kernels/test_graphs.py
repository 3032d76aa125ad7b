"""Recordings of a device share their memory, for as long as there is one. The device is played."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch
from sdxl_kernels.graphs import WARM_UPS, CudaRecorder, Graphs
from torch import Tensor

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Stream:
    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Graph:
    """Counts as a user of its pool until it is gone, as torch's allocator does."""

    users: dict[int, int]

    def __init__(self) -> None:
        self.replays, self.pool = 0, -1

    def replay(self) -> None:
        self.replays += 1

    def __del__(self) -> None:
        if self.pool >= 0:
            self.users[self.pool] -= 1


class Cuda:
    """What recording needs of ``torch.cuda``; a handle whose graphs are all gone is refused, as there."""

    def __init__(self) -> None:
        self.handles = count()
        self.users: dict[int, int] = {}
        self.main = self.here = Stream()
        self.current: torch.device | None = None
        self.captured: list[tuple[int, Stream]] = []
        users = self.users

        class Counted(Graph):
            pass

        Counted.users = users
        self.CUDAGraph = Counted
        self.Stream = Stream

    def graph_pool_handle(self) -> int:
        return next(self.handles)

    def current_stream(self) -> Stream:
        return self.here

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.here = self.here, stream
        yield
        self.here = before

    @contextmanager
    def graph(self, graph: Graph, *, pool: int, stream: Stream) -> Iterator[None]:
        assert self.users.get(pool) != 0, "all graphs of this pool are gone, and with them the pool"
        self.users[pool] = self.users.get(pool, 0) + 1
        graph.pool = pool
        self.captured.append((pool, stream))
        yield


def doubled(cuda: Cuda, device: torch.device = FIRST) -> Graphs:
    def work(changing: object, kept: object) -> Tensor:
        assert cuda.current == device
        assert isinstance(changing, list)
        return changing[0] * 2  # type: ignore[no-any-return]

    return Graphs(work, CudaRecorder(device, cuda))


def test_recordings_of_two_networks_share_memory_and_stream() -> None:
    cuda = Cuda()
    base, refiner = doubled(cuda), doubled(cuda)
    for graphs in (base, refiner):
        for size in (1, 2):
            assert torch.equal(graphs([torch.ones(size)], [], None), torch.full((size,), 2.0))
    assert len(set(cuda.captured)) == 1
    assert cuda.users == {0: 4}


def test_another_device_has_its_own() -> None:
    cuda = Cuda()
    first, second = doubled(cuda), doubled(cuda, SECOND)
    for graphs in (first, second):
        graphs([torch.ones(1)], [], None)
    assert cuda.users == {0: 1, 1: 1}


def test_the_memory_stays_for_the_other_and_goes_with_the_last() -> None:
    cuda = Cuda()
    base, refiner = doubled(cuda), doubled(cuda)
    base([torch.ones(1)], [], None)
    refiner([torch.ones(1)], [], None)
    del base
    gc.collect()
    assert cuda.users == {0: 1}
    again = doubled(cuda)
    again([torch.ones(1)], [], None)
    assert cuda.users == {0: 2}
    del again, refiner
    gc.collect()
    assert cuda.users == {0: 0}
    doubled(cuda)([torch.ones(1)], [], None)
    assert cuda.captured[-1][0] == 1, "a handle without recordings is not taken up again"


def test_what_is_recorded_was_run_before_on_the_same_stream() -> None:
    cuda, streams = Cuda(), []

    def work() -> Tensor:
        streams.append(cuda.here)
        return torch.ones(1)

    replay, _ = CudaRecorder(FIRST, cuda)(work)
    _, side = cuda.captured[0]
    assert streams == [side] * WARM_UPS + [cuda.main], "torch's own context changes streams while it records"
    assert side.waited_for == [cuda.main]
    assert cuda.main.waited_for == [side]
    replay()
    replay()
    assert cuda.current is None
