"""The comparison with diffusers is of the same work: both sides, built as the scripts build them, give the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_cli.bench.counting import count
from sdxl_cli.model.config import TINY

PIXELS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from random_folder import write_folder

    path: Path = tmp_path_factory.mktemp("weights") / "tiny"
    write_folder(path, TINY, torch.float32)
    return path


def job(folder: Path, kind: str, **changes: Any) -> Any:
    from job import Job

    given = Job(folder=str(folder), kind=kind, height=PIXELS, width=PIXELS + 32)  # type: ignore[arg-type]
    return replace(given, **changes)


@pytest.mark.parametrize("negative", [False, True], ids=["zeros", "negative"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step(folder: Path, negative: bool, batch: int) -> None:
    import side_diffusers
    import side_sdxl
    from job import relative

    given = job(folder, "unet", negative=negative, batch=batch)
    with torch.inference_mode():
        ours, theirs = side_sdxl.build(given, "default"), side_diffusers.build(given, "default")
        assert relative(ours(), theirs()) < 2e-5
        assert relative(ours(), side_diffusers.build(given, "best")()) < 2e-5
        assert count(ours).flops < 0.97 * count(theirs).flops
    other = job(folder, "unet", negative=not negative, batch=batch)
    with torch.inference_mode():
        assert relative(ours(), side_diffusers.build(other, "default")()) > 1e-3, "the texts do matter"


@pytest.mark.parametrize(
    ("kind", "limit"), [("decode", 2e-5), ("encode", 2e-5), ("text", 2e-5), ("image", 3e-3)]
)
def test_the_other_jobs(folder: Path, kind: str, limit: float) -> None:
    """Of a whole picture ours are rounded to 255 levels."""
    import side_diffusers
    import side_sdxl
    from job import relative

    given = job(folder, kind, steps=3)
    with torch.inference_mode():
        ours, theirs = (side.build(given, "default")() for side in (side_sdxl, side_diffusers))
    assert ours.shape == theirs.shape
    assert float(theirs.std()) > 0.05
    assert relative(ours, theirs) < limit


def test_weights_that_are_there_stay(folder: Path) -> None:
    from random_folder import write_folder

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = path.stat().st_mtime_ns
    write_folder(folder, TINY, torch.float32)
    assert path.stat().st_mtime_ns == before


def test_turns_and_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A B, then B A; ours first in the table, with no ratio; no claim where rounds disagree."""
    import harness
    from safetensors.torch import save_file

    order: list[str] = []
    speeds = {"sdxl": 1.0, "diffusers-default": 1.5, "diffusers-best": 1.0}

    class Fake:
        def __init__(self, name: str, job: Any) -> None:
            self.name, self.loaded = name, {"machine": {}}

        def ask(self, do: str, **more: Any) -> dict[str, Any]:
            if do == "ceiling":
                return {"rate": 1e12}
            if do == "count":
                return {"flops": 10**11, "ops": 7, "waits": 0}
            if "save" not in more:  # the run that makes ready
                return {"seconds": 60.0}
            order.append(self.name)
            save_file({"out": torch.full((3,), speeds[self.name])}, Path(more["save"]))
            seconds = speeds[self.name] * (1 + 0.01 * len(order))
            memory = dict.fromkeys(("before", "most", "own_before", "own", "reserved"), 1 << 30)
            return {"seconds": seconds, "cpu": seconds, "memory": memory}

        def close(self) -> None:
            order.append(f"{self.name} ends")

    monkeypatch.setattr(harness, "Contestant", Fake)
    for alone, kind in ((False, "unet"), (True, "image")):
        order.clear()
        found = harness.compare(job(tmp_path, kind), list(speeds), 2, counts=True, alone=alone)
        ran = [name for name in order if not name.endswith("ends")]
        assert ran == [*speeds, *reversed(speeds)]
        assert (order.index("sdxl ends") == 1) is alone
        rows = [line.split(" | ") for line in harness.table(found)[4:]]
        assert [row[0].strip("| ") for row in rows] == list(speeds)
        assert {row[1] for row in rows} == ({"60"} if kind == "image" else {""})
        assert rows[0][5] == ""
        assert rows[1][5].startswith("1.5")
        assert rows[2][5].startswith("none seen")
        assert rows[1][12].strip(" |") == "5.0e-01"
