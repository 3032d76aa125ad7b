"""A picture is finished and written behind the next one: in order, with nothing lost, whatever happens in front."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sdxl_cli import cli
from sdxl_cli.errors import FileError
from sdxl_cli.generation import picture as pictures
from sdxl_cli.generation.behind import Behind
from sdxl_cli.generation.canvas import Canvas
from sdxl_cli.generation.picture import read_pixels
from sdxl_cli.generation.pipeline import Run

PATIENCE = 60.0
"""Seconds after which a test that waits for something fails; none of it is slept."""


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "what should happen meanwhile did not"


def test_work_is_done_in_order_while_others_go_on() -> None:
    behind, log, free = Behind(), [], threading.Event()

    def slow() -> None:
        wait_for(free)
        log.append("first")

    behind.do(slow)
    behind.do(lambda: log.append("second"))
    log.append("in front")
    free.set()
    behind.settle()
    assert log == ["in front", "first", "second"]


def test_who_hands_over_too_much_waits() -> None:
    """One is done, one waits, the third has to wait for its place."""
    behind, free, third = Behind(), threading.Event(), threading.Event()
    behind.do(lambda: wait_for(free))
    behind.do(lambda: None)
    thread = threading.Thread(target=lambda: (behind.do(lambda: None), third.set()))
    thread.start()
    assert not third.wait(0.05)
    free.set()
    wait_for(third)
    thread.join()
    behind.settle()


@pytest.mark.parametrize("raised_by", ["do", "check", "settle"])
def test_an_error_comes_to_the_front_and_nothing_is_done_after_it(raised_by: str) -> None:
    behind, log, over = Behind(waiting=5), [], threading.Event()
    failure = FileError("a.png cannot be written: No space left on device")

    def fail() -> None:
        raise failure

    behind.do(fail)
    behind._undone[0].add_done_callback(lambda _: over.set())
    wait_for(over)
    use: dict[str, Callable[[], None]] = {
        "do": lambda: behind.do(lambda: log.append("after")), "check": behind.check, "settle": behind.settle
    }  # fmt: skip
    with pytest.raises(FileError) as raised:
        use[raised_by]()
    assert raised.value is failure
    behind.settle()
    assert log == []
    behind.do(lambda: log.append("anew"))
    behind.settle()
    assert log == ["anew"]


def test_what_waits_behind_a_failure_is_not_done() -> None:
    behind, log, free = Behind(), [], threading.Event()

    def fail() -> None:
        wait_for(free)
        raise FileError("no")

    behind.do(fail)
    behind.do(lambda: log.append("second"))
    free.set()
    with pytest.raises(FileError, match="no"):
        behind.settle()
    behind.settle()
    assert log == []


# As a command ---------------------------------------------------------------------------------------


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]


Generate = Callable[..., Result]


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str], models: dict[str, Path]) -> Generate:
    def run(*args: object) -> Result:
        always = ["generate", "a guitar", "-m", models["base"], "--steps", 2, "--seed", 5]
        code = cli.run([str(arg) for arg in [*always, *args]])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What happens when the first, the second, ... picture is about to be denoised."""
    happens: list[Callable[[], None]] = []
    advance = Run.advance

    def advanced(self: Run, *args: Any) -> None:
        if happens:
            happens.pop(0)()
        advance(self, *args)

    monkeypatch.setattr(Run, "advance", advanced)
    return happens


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What happens when the first, the second, ... picture is about to be written."""
    happens: list[Callable[[], None]] = []
    write = pictures.write_picture

    def written(*args: Any, **rest: Any) -> None:
        if happens:
            happens.pop(0)()
        write(*args, **rest)

    monkeypatch.setattr(pictures, "write_picture", written)
    return happens


Happens = list[Callable[[], None]]


def nothing() -> None:
    pass


def left() -> list[str]:
    return sorted(path.name for path in Path("outputs").iterdir())


def test_a_picture_is_written_while_the_next_is_denoised(
    generate: Generate, steps: Happens, writes: Happens
) -> None:
    """The first cannot be written before the second is begun, nor the third job's before the fourth's."""
    begun = [threading.Event() for _ in range(4)]
    steps += [event.set for event in begun]
    writes += [lambda: wait_for(begun[1]), lambda: wait_for(begun[2]), lambda: wait_for(begun[3])]
    result = generate("--num-images", 2, "--sweep", "cfg-scale=3,5")
    assert result.code == 0
    names = ["sdxl-00000-5.png", "sdxl-00001-6.png", "sdxl-00002-5.png", "sdxl-00003-6.png"]
    assert [path.name for path in result.paths] == left() == names
    assert not writes


def test_what_is_said_and_written_is_as_if_one_came_after_the_other(generate: Generate) -> None:
    together = generate("--num-images", 3, "-o", "together").paths
    alone = [generate("--seed", seed, "-o", f"{seed}.png").paths[0] for seed in (5, 6, 7)]
    assert [path.read_bytes() for path in together] == [path.read_bytes() for path in alone]
    told = json.loads(generate("--num-images", 3, "-o", "json", "--json").out)
    assert [(Path(one["path"]).name, one["seed"]) for one in told["pictures"]] == [
        (path.name, seed) for path, seed in zip(together, (5, 6, 7), strict=True)
    ]
    assert list(told) == ["pictures", "request", "resolved", "steps", "seconds"]
    assert told["seconds"] > 0


def test_a_picture_that_cannot_be_written_stops_the_run_at_the_next_step(
    generate: Generate, steps: Happens, writes: Happens
) -> None:
    """The second fails while the third is denoised: that is not made any more."""
    tried = threading.Event()

    def fail() -> None:
        tried.set()
        raise FileError("sdxl-00001-6.png cannot be written: No space left on device")

    made: list[int] = []
    writes += [nothing, fail]
    steps += [nothing, nothing, lambda: wait_for(tried), lambda: made.append(4), lambda: made.append(5)]
    result = generate("--num-images", 5)
    assert (result.code, left()) == (3, ["sdxl-00000-5.png"])
    assert [path.name for path in result.paths] == ["sdxl-00000-5.png"]
    assert "sdxl: sdxl-00001-6.png cannot be written: No space left on device" in result.err
    assert len(made) <= 1, "what was raised is seen at a step, at the latest at the end of the picture"
    assert writes == []


def test_an_interruption_leaves_whole_pictures_and_names_them(
    generate: Generate, steps: Happens, writes: Happens
) -> None:
    """While the second is denoised and the first is not written yet."""
    interrupted = threading.Event()

    def interrupt() -> None:
        interrupted.set()
        raise KeyboardInterrupt

    writes.append(lambda: wait_for(interrupted))
    steps += [nothing, interrupt]
    result = generate("--num-images", 3)
    assert (result.code, left()) == (130, ["sdxl-00000-5.png"])
    assert [path.name for path in result.paths] == ["sdxl-00000-5.png"]
    assert read_pixels(result.paths[0]).shape == (64, 64, 3)


def test_an_interruption_is_told_even_when_the_last_picture_cannot_be_written(
    generate: Generate, steps: Happens, writes: Happens
) -> None:
    interrupted = threading.Event()

    def interrupt() -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def fail() -> None:
        wait_for(interrupted)
        raise FileError("the disk is full")

    writes.append(fail)
    steps += [nothing, interrupt]
    result = generate("--num-images", 3)
    assert (result.code, result.out, left()) == (130, "", [])
    assert "warning: the disk is full" in result.err


def test_a_picture_is_put_together_behind_too(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    start = generate("-o", "start.png").paths[0]
    threads, finish = [], Canvas.finish

    def finished(self: Canvas, *args: Any) -> Any:
        threads.append(threading.current_thread())
        return finish(self, *args)

    monkeypatch.setattr(Canvas, "finish", finished)
    assert generate("--init-img", start, "--strength", 0.9, "-o", "b.png").code == 0
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_refined_pictures_are_written_behind_the_next_too(
    generate: Generate,
    steps: Happens,
    writes: Happens,
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = generate("--num-images", 2, "-o", "made").paths
    begun = threading.Event()
    steps += [nothing, begun.set]
    writes.append(lambda: wait_for(begun))
    told = ["--strength", "0.5", "--seed", "3", "-o", "refined", "--json"]
    assert cli.run(["refine", str(first), str(second), "-m", str(models["base"]), *told]) == 0
    paths = [Path(one["path"]) for one in json.loads(capsys.readouterr().out)["pictures"]]
    assert [path.name.split("-refined")[0] for path in paths] == [first.stem, second.stem]
    assert not writes
    alone = cli.run(["refine", str(second), "-m", str(models["base"]), *told[:-2], "alone", "--json"])
    assert alone == 0
    again = Path(json.loads(capsys.readouterr().out)["pictures"][0]["path"])
    assert again.read_bytes() == paths[1].read_bytes()
