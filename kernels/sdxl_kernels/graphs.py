"""A computation recorded once and replayed: on a GPU, thousands of launches become one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

MOST = 8
"""Recordings that are kept; the one unused for longest goes first. Pictures of eight shapes can take turns."""
WARM_UPS = 2
"""Runs before a recording, in which libraries choose their kernels and take their workspaces."""

Work = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""From what changes with every call, and what stays for many, to a result. It must not make the host wait."""
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Runs something; gives what runs it again, on the same memory, and where its result will then be."""


_unrecorded = ContextVar("unrecorded", default=False)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within it everything is computed anew: nothing is recorded or replayed, so that it can be counted."""
    token = _unrecorded.set(True)
    try:
        yield
    finally:
        _unrecorded.reset(token)


@dataclass(slots=True)
class _Recording:
    changing: list[Tensor]
    kept: list[Tensor]
    replay: Callable[[], None]
    result: Tensor
    holds: object = None
    """Whose values ``kept`` has."""


class Graphs:
    """Recordings of one computation, by the shapes of what goes in."""

    def __init__(self, work: Work, record: Record, most: int = MOST) -> None:
        self._work, self._record, self._most = work, record, most
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()

    def __call__(self, changing: Sequence[Tensor], kept: Sequence[Tensor], whose: object) -> Tensor:
        """The result, in memory of its own.

        Args:
            changing: copied to where the recording reads.
            kept: likewise, but only when ``whose`` is another object than the last time.
            whose: what ``kept`` belongs to.
        """
        if _unrecorded.get():
            return self._work(changing, kept)
        key = tuple((x.shape, x.dtype, x.device) for x in (*changing, *kept))
        recording = self._recordings.get(key)
        if recording is None:
            # before the new one, whose memory may be that of the old one
            while len(self._recordings) >= self._most:
                self._recordings.popitem(last=False)
            recording = self._recordings[key] = self._recorded(changing, kept)
        else:
            _copy(changing, recording.changing)
            if recording.holds is not whose:
                _copy(kept, recording.kept)
        recording.holds = whose
        self._recordings.move_to_end(key)
        recording.replay()
        return recording.result.clone()

    def _recorded(self, changing: Sequence[Tensor], kept: Sequence[Tensor]) -> _Recording:
        ours, stay = [x.clone() for x in changing], [x.clone() for x in kept]
        replay, result = self._record(lambda: self._work(ours, stay))
        return _Recording(ours, stay, replay, result)


class Pool:
    """The memory of a device's recordings, which all of them share: no two are ever replayed at the same time."""

    def __init__(self, cuda: Any) -> None:
        """``cuda`` is ``torch.cuda``, or stands for it."""
        self.handle: Any = cuda.graph_pool_handle()
        self.side: Any = cuda.Stream()
        """Where recording happens, and the runs before it."""


_POOLS: WeakValueDictionary[torch.device, Pool] = WeakValueDictionary()
"""By device. A pool lives as long as a recording: torch takes no handle whose recordings are all gone."""


class CudaRecorder:
    """Records CUDA graphs of one device. All recorders of a device share their memory."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        """``cuda`` is ``torch.cuda``, or stands for it."""
        self._device, self._cuda = device, cuda

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See :data:`Record`."""
        cuda = self._cuda
        # streams and graphs belong to the device that is current, which need not be the one that computes
        with cuda.device(self._device):
            if (pool := _POOLS.get(self._device)) is None:
                pool = _POOLS[self._device] = Pool(cuda)
            main = cuda.current_stream()
            pool.side.wait_stream(main)
            with cuda.stream(pool.side):
                for _ in range(WARM_UPS):
                    work()
            main.wait_stream(pool.side)
            graph = cuda.CUDAGraph()
            with cuda.graph(graph, pool=pool.handle, stream=pool.side):
                result = work()
        return partial(self._replay, graph, pool), result

    def _replay(self, graph: Any, pool: Pool) -> None:
        """``pool`` is held on to for as long as this may be called."""
        with self._cuda.device(self._device):
            graph.replay()


def _copy(values: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    for value, place in zip(values, places, strict=True):
        place.copy_(value)
