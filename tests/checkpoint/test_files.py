"""Tensor files: what is read costs nothing, what is damaged is named, what is written is whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sdxl_cli.checkpoint import atomic, stream
from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.header import format_bytes, read_header
from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.checkpoint.write import save_tensors
from sdxl_cli.errors import FileError, SdxlError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(3.5, dtype=torch.float16),
    "c": torch.arange(5, dtype=torch.bfloat16),
    "ids": torch.tensor([[1, 2, 49407]]),
    "none": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
    "fp8": torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    save_tensors(path, TENSORS, {"note": "ünïcode"})
    return path


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def test_safetensors_reads_what_we_write(file: Path) -> None:
    theirs = safetensors.torch.load_file(file)
    assert theirs.keys() == TENSORS.keys()
    assert all(equal(theirs[name], tensor) for name, tensor in TENSORS.items())
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata()["note"] == "ünïcode"


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"note": "x"})
    ours = TensorFile(path)
    assert ours.metadata == {"note": "x"}
    assert ours.shapes["a"] == (2, 3)
    assert ours.dtypes["c"] == "BF16"
    assert all(equal(ours.read(name), tensor) for name, tensor in TENSORS.items())


def test_casts_floats_and_nothing_else(file: Path) -> None:
    ours = TensorFile(file)
    for name, tensor in TENSORS.items():
        wanted = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert equal(ours.read(name, torch.bfloat16), wanted)


def test_a_cast_of_more_than_one_chunk(tmp_path: Path) -> None:
    tensor = torch.randn(3, 500_000, generator=torch.Generator().manual_seed(0))
    save_tensors(tmp_path / "x.safetensors", {"x": tensor})
    assert equal(TensorFile(tmp_path / "x.safetensors").read("x", torch.float16), tensor.half())


def test_writing_into_a_tensor_never_reaches_the_file(file: Path) -> None:
    before = file.read_bytes()
    tensor = TensorFile(file).read("a")
    tensor.mul_(100)
    assert torch.equal(tensor, TENSORS["a"] * 100)
    assert file.read_bytes() == before
    assert torch.equal(TensorFile(file).read("a"), TENSORS["a"])


def test_tensors_outlive_the_file_and_its_reader(file: Path) -> None:
    tensor = TensorFile(file).read("a")
    file.unlink()
    assert torch.equal(tensor, TENSORS["a"])


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    table = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "float": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" + struct.pack("<2f", 1.5, -2.0))
    assert TensorFile(path).read("float").tolist() == [1.5, -2.0]


def test_reading_costs_no_memory_until_written_to(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    save_tensors(path, {"big": torch.ones(64 << 20, dtype=torch.uint8)})

    def private() -> int:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty"):
                return int(line.split()[1]) << 10
        raise AssertionError

    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs Linux")
    before = private()
    tensor = TensorFile(path).read("big")
    assert int(tensor.sum()) == 64 << 20
    assert private() - before < 8 << 20


def test_a_mapping_may_be_larger_than_memory(tmp_path: Path) -> None:
    """A private writable mapping counts as memory to come unless told otherwise."""
    path = tmp_path / "sparse.safetensors"
    count = 8 << 40
    text = json.dumps({"x": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    with path.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        try:
            os.truncate(path, 8 + len(text) + count)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    assert int(TensorFile(path).read("x")[count - 1]) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Sign in", "web page"),
        (b"\n\n<html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 50, "pickle"),
        (b"\x80\x02}q\x00X\x05", "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 30, "GGUF"),
        (b'{"error": "Invalid username"}', "JSON"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "no safetensors file"),
        (b"abc", "no safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{" + b" " * 40, "no safetensors file"),
        ((50).to_bytes(8, "little") + b'{"a": {"dtype"', "ends inside its table of contents"),
        ((20).to_bytes(8, "little") + b'{"a": {"dtype": "F32', "damaged table of contents"),
    ],
)
def test_other_files_are_named_as_such(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=says) as raised:
        TensorFile(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("first", [b"<", b"{"])
def test_a_header_length_that_looks_like_a_signature_is_none(first: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = (
        json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
        .encode()
        .ljust(256 + first[0])
    )
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07")
    assert TensorFile(path).read("x").tolist() == [7]


def test_a_truncated_file_says_how_much_is_here(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"x": torch.zeros(6_900_000 // 4)})
    os.truncate(path, 3_100_000)
    with pytest.raises(FileError, match=r"model\.safetensors: 3\.1 of 6\.9 MB are here; download it again"):
        TensorFile(path)


def test_missing_folders_and_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        TensorFile(tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match="is a folder"):
        TensorFile(tmp_path)


def test_offsets_that_do_not_fit_the_shape_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    text = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(FileError, match="damaged"):
        TensorFile(path)


def test_bytes_after_the_end_are_damage(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0" * 12)
    with pytest.raises(FileError, match="12 bytes longer"):
        TensorFile(file)


def test_a_dtype_torch_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    text = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(FileError, match="x has dtype F4"):
        TensorFile(path)


def test_the_hash_is_that_of_the_tensor_bytes(file: Path) -> None:
    header = read_header(file)
    start = min(entry.start for entry in header.entries.values())
    digest = hashlib.sha256(file.read_bytes()[start:]).hexdigest()
    assert header.metadata["modelspec.hash_sha256"] == f"0x{digest}"


def test_saving_casts_and_gathers_views(tmp_path: Path) -> None:
    path = tmp_path / "cast.safetensors"
    table = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    save_tensors(path, {"t": table.T, "i": torch.tensor([7])}, dtype=torch.float16)
    theirs = safetensors.torch.load_file(path)
    assert equal(theirs["t"], table.T.half())
    assert theirs["i"].dtype == torch.int64


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (6938078334, "6.9 GB")]
)
def test_sizes_are_written_as_disks_count(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_an_interruption_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            assert temporary.suffix == ".txt"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    for text in ("first", "second"):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_without_overwrite_nothing_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    with atomic_write(path, overwrite=False) as temporary:
        temporary.write_text("first")
    with pytest.raises(FileError, match="exists already"), atomic_write(path, overwrite=False) as temporary:
        temporary.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_without_overwrite_a_file_that_appears_meanwhile_wins(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"

    def late() -> None:
        with atomic_write(path, overwrite=False) as temporary:
            temporary.write_text("late")
            path.write_text("early")

    with pytest.raises(FileError, match="exists already"):
        late()
    assert path.read_text() == "early"


def test_a_file_is_written_with_the_users_permissions(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_text("x")
    save_tensors(ours, {"x": torch.zeros(1)})
    assert ours.stat().st_mode == plain.stat().st_mode


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(SdxlError, match="the disk is full"), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("x")
    assert not list(tmp_path.iterdir())


def test_room_is_checked_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(SdxlError, match=r"needs 4\.0 MB, the disk has 1\.0 MB free"):
        save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1_000_000)})
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(FileError, match="cannot be written"),
        atomic_write(tmp_path / "file" / "below") as temporary,
    ):
        temporary.write_text("x")


def test_saving_holds_one_cast_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = {str(index): torch.ones(4 << 20) for index in range(16)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_tensors(tmp_path / "x.safetensors", tensors, dtype=torch.float16)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10  # kilobytes; all sixteen casts would be 128 MB
