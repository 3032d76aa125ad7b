"""Reading ahead: what is read, in which order, and when it is left out."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_cli.checkpoint import ahead
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.meminfo import available_memory

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a call of Linux")


def meminfo(folder: Path, kilobytes: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal: 99 kB\nMemAvailable:   {kilobytes} kB\nCached: 3 kB\n")
    return path


def test_what_linux_says_is_free(tmp_path: Path) -> None:
    assert available_memory(meminfo(tmp_path, 123)) == 123 * 1024
    assert available_memory(tmp_path / "none") is None
    (tmp_path / "other").write_text("MemTotal: 99 kB\n")
    assert available_memory(tmp_path / "other") is None


@linux
def test_files_are_read_in_the_order_of_their_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(ahead, "_read", read.extend)
    base, refiner = locate("bundled", "base"), locate("bundled", "refiner")
    thread = ahead.read_ahead([base, refiner], meminfo(tmp_path, 1 << 24))
    assert thread is not None
    thread.join()
    assert read == [*base.paths, *refiner.paths]


@linux
def test_larger_files_than_the_memory_can_keep_are_left_alone(tmp_path: Path) -> None:
    files = [locate("bundled", "base")]
    kilobytes = files[0].size // 1024
    assert ahead.read_ahead(files, meminfo(tmp_path, kilobytes)) is None
    assert ahead.read_ahead(files, tmp_path / "none") is None


@linux
def test_every_page_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "CHUNK", 1 << 16)
    asked: list[tuple[int, int, int]] = []
    path = tmp_path / "file"
    path.write_bytes(bytes(150_000))

    def advise(start: int, length: int, how: int) -> int:
        asked.append((start, length, how))
        return 0

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        ahead._populate(pages, advise)
    first = asked[0][0]
    assert [(start - first, length) for start, length, _ in asked] == [
        (0, 65536), (65536, 65536), (131072, 18928)
    ]  # fmt: skip
    assert {how for *_, how in asked} == {ahead.POPULATE_READ}
    assert not first % mmap.PAGESIZE


def resident(path: Path) -> list[bool]:
    """Which pages of a file are in memory, as mincore says."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        there = ctypes.create_string_buffer(len(pages) // mmap.PAGESIZE)
        hold = (ctypes.c_char * 0).from_buffer(pages)
        assert libc.mincore(ctypes.addressof(hold), len(pages), there) == 0
        del hold
    return [bool(page & 1) for page in there.raw]


@linux
def test_the_system_takes_the_call(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * 65536)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(resident(path)):
        pytest.skip("this file system keeps its pages in memory")
    ahead._read([tmp_path / "none", path])
    assert all(resident(path))


def test_a_wrong_model_is_told_before_torch_is_there(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from sdxl_cli import cli\n"
        f"status = cli.run(['generate', 'a cat', '--model', {str(tmp_path / 'none.safetensors')!r}])\n"
        "print(status, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]
    assert "none.safetensors" in done.stderr
