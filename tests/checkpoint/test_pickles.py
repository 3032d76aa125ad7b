"""torch's own files are read like any other, and nothing in them runs."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_cli.checkpoint.header import is_pickle
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.pickle_file import PickleFile
from sdxl_cli.checkpoint.read import load_model, load_vae
from sdxl_cli.checkpoint.write import save_tensors
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import ModelConfig
from sdxl_cli.model.sdxl import SDXL

F32 = torch.float32
Build = Callable[[ModelConfig], SDXL]


def same(ours: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = ours.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("nested", [True, False], ids=["below state_dict", "bare"])
def test_a_whole_model(
    zipped: bool, nested: bool, tmp_path: Path, random_model: Build, released_names: ModelConfig
) -> None:
    model = random_model(released_names)
    state: dict[str, Any] = model.state_dict()
    content = {"state_dict": state, "global_step": 7, "optimizer": {"x": torch.ones(1)}} if nested else state
    path = tmp_path / "old.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert is_pickle(path)
    files = locate(str(path))
    assert (files.identity.kind, files.layout) == ("base", "original")
    assert same(load_model(files, dtype=F32, vae_dtype=F32), model)
    assert (PickleFile(path).metadata == {"global_step": "7"}) == nested


@pytest.fixture
def released_names(small_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """Pickles have no place for a configuration: pretend that the small sizes are the released ones."""
    monkeypatch.setattr("sdxl_cli.checkpoint.identify.BASE", small_config)
    monkeypatch.setattr("sdxl_cli.checkpoint.locate.BASE", small_config)
    return small_config


def test_an_autoencoder_of_another_program(
    tmp_path: Path, random_model: Build, released_names: ModelConfig
) -> None:
    vae = random_model(released_names).vae
    # a slice of a larger tensor and one in another order of memory, as training leaves them
    state = {name: torch.cat([t, t]).split(len(t))[1] for name, t in vae.state_dict().items()}
    name = "decoder.conv_in.weight"
    state[name] = state[name].contiguous(memory_format=torch.channels_last)
    torch.save({"state_dict": state}, tmp_path / "vae.pt")
    loaded = load_vae(locate(str(tmp_path / "vae.pt"), "vae"), dtype=F32)
    assert same(loaded, vae)
    assert loaded.state_dict()[name].is_contiguous()


def test_writing_into_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(3)}, path)
    before = path.read_bytes()
    PickleFile(path).read("x").mul_(5)
    assert path.read_bytes() == before
    assert PickleFile(path).read("x", torch.float16).tolist() == [1, 1, 1]


class Evil:
    """Makes a file on opening, wherever a pickle is trusted."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_does_not_run(zipped: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.ckpt", tmp_path / "it-ran"
    torch.save(
        {"state_dict": {"x": torch.ones(1)}, "hook": Evil(mark)}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(FileError, match=r"evil\.ckpt wants to run \w+\.mkdir when it is opened") as raised:
        locate(str(path))
    assert "\n" not in str(raised.value)
    assert not mark.exists()
    if zipped:
        torch.load(path, weights_only=False)
        assert mark.exists(), "the file would have run its code elsewhere: the test above means something"


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "plain.pt", tmp_path / "it-ran"
    path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(FileError, match=r"plain\.pt"):
        locate(str(path))
    assert not mark.exists()


def test_truncation_at_every_stage_is_one_line(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(5000)}, buffer)
    whole, path = buffer.getvalue(), tmp_path / "cut.ckpt"
    for share in (0.01, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(FileError, match=r"cut\.ckpt is cut short, damaged, .* are here\)") as raised:
            PickleFile(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "holds a list"),
        ({"step": 3}, "holds no tensors"),
        ({"z": torch.zeros(2, dtype=torch.cfloat)}, "z is"),
    ],
)
def test_files_of_other_things(content: object, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(FileError, match=says):
        PickleFile(tmp_path / "x.pt")


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(FileError, match="no file of torch"):
        locate(str(tmp_path / "x.ckpt"))


def test_safetensors_under_a_pickles_name_and_the_reverse(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.ckpt", {"x": torch.ones(1)})
    assert not is_pickle(tmp_path / "a.ckpt")
    torch.save({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    assert is_pickle(tmp_path / "b.safetensors")
