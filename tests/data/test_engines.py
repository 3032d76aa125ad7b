"""Whatever looks at the pictures, and whatever dies meanwhile, the manifest is the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdxl_cli.data.manifest import DatasetConfig
from sdxl_cli.data.pool import CHUNK, in_processes
from tests.data.pictures import TINY, make_manifest, noise

CONFIG = DatasetConfig(buckets=TINY, flip=True, seed=3)


@dataclass(frozen=True)
class Doubles:
    """Doubles numbers; some kill the process that has them, always or the first time only."""

    folder: Path
    deadly: tuple[int, ...] = ()
    once: tuple[int, ...] = ()

    def __call__(self, items: Sequence[int]) -> list[int]:
        for item in items:
            mark = self.folder / str(item)
            if item in self.deadly or (item in self.once and not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return [2 * item for item in items]

    def lost(self, item: int) -> int:
        return -item


def test_a_killed_worker_loses_nothing_and_only_what_kills_is_given_up(tmp_path: Path) -> None:
    items = range(1, 6)
    work = Doubles(tmp_path, deadly=(4,), once=(1,))
    found = [value for values in in_processes(work, items, 1, size=2) for value in values]
    assert found == [-item if item == 4 else 2 * item for item in items]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(CHUNK + 30):
        noise(60 + index % 7 * 9, 50 + index % 5 * 14, index).save(folder / f"{index:03d}.bmp")
    (folder / "zero.png").touch()
    (folder / "copy.bmp").write_bytes((folder / "001.bmp").read_bytes())
    return folder


def test_processes_give_the_manifest_that_one_gives(many: Path) -> None:
    assert make_manifest(many, CONFIG, workers=2) == make_manifest(many, CONFIG)


@pytest.mark.ray
def test_ray_gives_the_manifest_that_one_gives(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it leaves a token in the home folder
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30)
    try:
        assert make_manifest(many, CONFIG, engine="ray") == make_manifest(many, CONFIG)
    finally:
        ray.shutdown()
