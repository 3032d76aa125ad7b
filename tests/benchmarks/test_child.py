"""Processes that answer orders, and what becomes of those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from child import serve
def obey(order):
    print("this is no answer")
    if order["do"] == "sleep":
        time.sleep(60)
    if order["do"] == "die":
        sys.exit(3)
    return {"twice": 2 * order["number"]}
serve(obey)
"""


def test_orders_and_answers() -> None:
    import child

    one = child.Child("one", ["-c", PROGRAM, str(SCRIPTS)], {})
    assert one.ask("double", number=4) == {"twice": 8}
    one.order("double", number=5)
    assert one.answer(within=30) == {"twice": 10}
    with pytest.raises(child.Ended, match="one ended with status 3"):
        one.ask("die")
    assert issubclass(child.Ended, SystemExit), "a script that does not expect it ends with the same words"


def test_who_is_not_done_in_time_is_ended() -> None:
    import child

    one = child.Child("one", ["-c", PROGRAM, str(SCRIPTS)], {})
    assert one.ask("double", number=1) == {"twice": 2}
    with pytest.raises(child.OutOfTime, match="one was not done in time"):
        one.ask("sleep", within=0.2)
    with pytest.raises(child.Ended):
        one.ask("double", number=1)
