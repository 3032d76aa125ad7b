"""A process that answers every line of JSON with one, and both ends of that."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Answer = dict[str, Any]


class Ended(SystemExit):
    """The process is gone, or said something else than an answer; who does not handle it ends, too."""


class OutOfTime(Exception):
    """It was not done in time, and has been ended."""


class Child:
    """Waits for a line while others run, so that what it holds stays."""

    def __init__(self, name: str, command: Sequence[str], ready: Mapping[str, str]) -> None:
        """``ready`` is what its environment has besides ours."""
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ready,
        )

    def ask(self, do: str, *, within: float | None = None, **more: Any) -> Answer:
        """Order something, and wait for the answer; at most so many seconds, where they are given.

        Raises:
            Ended, OutOfTime: see there.
        """
        self.order(do, **more)
        return self.answer(within)

    def order(self, do: str, **more: Any) -> None:
        """What is to be done while others are told, too; :meth:`answer` waits for it."""
        assert self._process.stdin
        try:
            print(json.dumps({"do": do, **more}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._gone()

    def answer(self, within: float | None = None) -> Answer:
        """The next line."""
        assert self._process.stdout
        if within is not None and not select.select([self._process.stdout], [], [], max(within, 0.0))[0]:
            self.kill()
            raise OutOfTime(f"{self.name} was not done in time and was ended")
        line = self._process.stdout.readline()
        if not line:
            self._gone()
        return dict(json.loads(line))

    def close(self) -> None:
        """Let it end by itself."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.wait()

    def _gone(self) -> None:
        raise Ended(f"{self.name} ended with status {self._process.wait()}; what it said is above")


def serve(obey: Callable[[Answer], Answer], first: Callable[[], Answer] | None = None) -> None:
    """The other end: answer every order on stdin on what stdout was; whatever else is printed is no answer.

    Args:
        obey: gives the answer to an order.
        first: gives an answer before any order.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    if first:
        print(json.dumps(first()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), file=answers, flush=True)
