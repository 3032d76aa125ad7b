"""What is done behind the next picture while that is made: finishing, compressing and writing the last one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from sdxl_cli.errors import SdxlError

WAITING = 1
"""Pieces of work that may wait for the one being done."""


class Behind:
    """Does one piece of work after the other, in a thread of its own.

    What a piece raises is raised to whoever uses this next; the pieces behind it are then not done. An interruption
    of the main thread interrupts no piece.
    """

    def __init__(self, waiting: int = WAITING) -> None:
        """``waiting``: when so many wait already, whoever hands over another waits too."""
        self._waiting, self._failed = waiting, False
        self._thread = ThreadPoolExecutor(1, "behind")
        self._undone: deque[Future[None]] = deque()

    def do(self, work: Callable[[], object]) -> None:
        """Have this done after all that was handed over before.

        Raises:
            Exception: whatever earlier work raised.
        """
        while len(self._undone) > self._waiting:
            self._take()
        self.check()
        self._undone.append(self._thread.submit(self._done, work))

    def check(self) -> None:
        """Raise what work that is over raised; waits for none."""
        while self._undone and self._undone[0].done():
            self._take()

    def settle(self) -> None:
        """Wait until everything is done.

        Raises:
            Exception: whatever the work raised.
        """
        while self._undone:
            self._take()

    def _done(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise

    def _take(self) -> None:
        """Wait for the oldest piece; after one that failed the others are over at once, and a new beginning is made."""
        # an interruption while waiting leaves it where it is
        failure = self._undone[0].exception()
        self._undone.popleft()
        if failure is not None:
            wait(self._undone)
            self._undone.clear()
            self._failed = False
            raise failure


@contextmanager
def finishing(behind: Behind, warn: Callable[[str], None]) -> Iterator[None]:
    """When it is left, all work that was handed over is done, also where something stopped what was to be next.

    Args:
        behind: who does it.
        warn: is told what could not be done when something else is raised already.

    Raises:
        Exception: whatever the work raised.
    """
    try:
        yield
    except BaseException:
        try:
            behind.settle()
        except (SdxlError, OSError) as error:
            warn(str(error))
        raise
    behind.settle()
