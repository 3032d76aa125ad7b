"""Work in processes that may die: what they were doing is done again, and only what kills them is given up."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")

CHUNK = 64
"""Items handed to a worker at a time."""
_AHEAD = 4
"""Chunks in flight for each worker."""
_TRIES = 2
"""How often one item alone may kill a worker before it is given up: once may be the machine's fault."""


class Work(Protocol[T, R_co]):  # type: ignore[misc]
    """What is done; goes to the workers by pickle."""

    def __call__(self, items: Sequence[T]) -> list[R_co]:
        """The results of items, in their order."""
        ...

    def lost(self, item: T) -> R_co:
        """The result of an item that kills whoever works on it."""
        ...


def chunks(items: Sequence[T], size: int = CHUNK) -> Iterator[Sequence[T]]:
    """``items`` in stretches of ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))


def in_processes(
    work: Work[T, R], items: Sequence[T], workers: int, *, size: int = CHUNK
) -> Iterator[list[R]]:
    """Results of ``items``, chunk by chunk in their order.

    A worker that is killed (a decoder that crashes, the kernel short of memory) loses nothing: its chunk is done
    again, by halves, until the one item that kills is found; that one's result is ``work.lost(item)``.
    """
    pool = _Pool(workers)
    waiting: deque[tuple[Sequence[T], Future[list[R]]]] = deque()
    coming = chunks(items, size)
    try:
        while True:
            while len(waiting) < _AHEAD * workers and (chunk := next(coming, None)) is not None:
                waiting.append((chunk, pool.submit(work, chunk)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.restart()
                result = _careful(pool, work, chunk)
                for index, (later, other) in enumerate(waiting):
                    if other.cancelled() or not other.done() or other.exception() is not None:
                        waiting[index] = (later, pool.submit(work, later))
            yield result
    finally:
        pool.close()


def _careful(pool: _Pool, work: Work[T, R], chunk: Sequence[T]) -> list[R]:
    """The results of a chunk that may have killed its worker, with nothing else running."""
    for _ in range(_TRIES if len(chunk) == 1 else 1):
        try:
            return pool.submit(work, chunk).result()
        except BrokenProcessPool:
            pool.restart()
    if len(chunk) == 1:
        return [work.lost(chunk[0])]
    middle = len(chunk) // 2
    return _careful(pool, work, chunk[:middle]) + _careful(pool, work, chunk[middle:])


class _Pool:
    """A process pool that can be begun anew."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        # a forked copy of a process with threads (torch's, pyarrow's) may hang
        return ProcessPoolExecutor(self._workers, mp_context=multiprocessing.get_context("spawn"))

    def submit(self, work: Work[T, R], chunk: Sequence[T]) -> Future[list[R]]:
        """Have a chunk done; a pool that broke meanwhile gives a future that says so."""
        try:
            return self._pool.submit(work, chunk)
        except BrokenProcessPool as error:
            broken: Future[list[R]] = Future()
            broken.set_exception(error)
            return broken

    def restart(self) -> None:
        """Take new workers."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._new()

    def close(self) -> None:
        """Let the workers go."""
        self._pool.shutdown(wait=True, cancel_futures=True)
