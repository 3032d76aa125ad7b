"""Storage for torch.distributed.checkpoint: safetensors for the tensors, JSON for what is where, and no pickles.

torch plans which process writes and reads which part of which tensor, also for another number of processes than wrote
them. Its own storage keeps the plan as a pickle, which a damaged or foreign folder could make run anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.header import read_header
from sdxl_cli.checkpoint.stream import HASH_KEY, Pending, write_pending
from sdxl_cli.checkpoint.tensor_file import DTYPES, TensorFile
from sdxl_cli.errors import FileError

INDEX_FILE = "state.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 24
"""Bytes hashed at a time."""


class StateWriter(StorageWriter):
    """A file of tensors for every process that has some to write, and the index when all are there."""

    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        """``folder`` exists; ``values`` are JSON values that go into the index, the same in every process."""
        self.folder, self.values = folder, values

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing depends on the disk."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Every process gets its file's name."""
        return [
            replace(plan, storage_data=f"part-{number:05d}.safetensors") for number, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This process's parts, one at a time."""
        pending = {_key(item.index): _pending(item, planner) for item in plan.items}
        home: tuple[str, dict[str, Any]] = (plan.storage_data, {})
        if pending:
            path = self.folder / plan.storage_data
            write_pending(path, pending)
            home = (plan.storage_data, {"size": path.stat().st_size, "header": _header_digest(path)})
        sizes = [(item.index, pending[_key(item.index)].size) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, size, home) for index, size in sizes])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The index, which makes a folder of files a state."""
        every = [result for written in results for result in written]
        home = {result.index: result.storage_data[0] for result in every}
        body = {
            "values": self.values,
            "tensors": {
                name: _described(name, entry, home)
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            },
            "files": dict(
                sorted({result.storage_data[0]: result.storage_data[1] for result in every}.items())
            ),
        }
        with atomic_write(self.folder / INDEX_FILE) as temporary:
            text = json.dumps({"sha256": _digest(body), **body}) + "\n"
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Not chosen by the form of a path."""
        return False


class StateReader(StorageReader):
    """The inverse, for any number of processes."""

    def __init__(self, folder: Path) -> None:
        """Raises FileError: the index is missing or damaged."""
        self.folder, self.index = folder, read_index(folder)
        self._files: dict[str, TensorFile] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is used once."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What torch needs to know to plan."""
        tensors, home = {}, {}
        for name, entry in self.index["tensors"].items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk["at"]), torch.Size(chunk["shape"]))
                for chunk in entry["chunks"]
            ]
            properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            for chunk in entry["chunks"]:
                home[MetadataIndex(name, chunk["at"])] = chunk["file"]
        return Metadata(state_dict_metadata=dict(tensors), storage_data=home)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Keep where things are."""
        self._home: dict[MetadataIndex, str] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing depends on the disk."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Everybody reads for itself."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the parts that this process asked for to where it wants them."""
        for item in plan.items:
            stored = self._file(self._home[item.storage_index]).read(_key(item.storage_index))
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                stored = stored.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(stored)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name)
        return self._files[name]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Not chosen by the form of a path."""
        return False


def read_index(folder: Path) -> dict[str, Any]:
    """``values``, ``tensors`` and ``files`` of a state.

    Raises:
        FileError: there is no index, or it is not as it was written.
    """
    path = folder / INDEX_FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        digest = said.pop("sha256")
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, KeyError) as error:
        raise FileError(f"{path} is damaged") from error
    if digest != _digest(said):
        raise FileError(f"{path} is damaged")
    return dict(said)


def check_file(path: Path, size: int, header: str) -> None:
    """See that a file of a state is as it was written.

    Args:
        path: of the file.
        size: bytes that were written.
        header: hash of its table of contents, which has the hash of the rest in it.

    Raises:
        FileError: it is missing, of another size, or its bytes have changed.
    """
    if not path.is_file():
        raise FileError(f"{path} is missing")
    if (found := path.stat().st_size) != size:
        raise FileError(f"{path} has {found} bytes, {size} were written")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(_header_size(path))
        while data := file.read(_CHUNK):
            digest.update(data)
    if (
        _header_digest(path) != header
        or read_header(path).metadata.get(HASH_KEY) != f"0x{digest.hexdigest()}"
    ):
        raise FileError(f"{path} is damaged: its bytes have changed since they were written")


def _header_size(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _header_digest(path: Path) -> str:
    size = _header_size(path)
    with path.open("rb") as file:
        return hashlib.sha256(file.read(min(size, path.stat().st_size))).hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _key(index: MetadataIndex) -> str:
    """A part's name in its file."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _pending(item: WriteItem, planner: SavePlanner) -> Pending:
    assert item.tensor_data is not None, "a state has tensors only"
    return Pending(
        item.tensor_data.properties.dtype,
        tuple(item.tensor_data.chunk.sizes),
        partial(_resolved, planner, item),
    )


def _resolved(planner: SavePlanner, item: WriteItem) -> Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor)
    return data


def _described(name: str, entry: TensorStorageMetadata, home: Mapping[MetadataIndex, str]) -> dict[str, Any]:
    chunks = [
        {
            "at": list(chunk.offsets),
            "shape": list(chunk.sizes),
            "file": home[MetadataIndex(name, chunk.offsets)],
        }
        for chunk in entry.chunks
    ]
    return {"dtype": _NAMES[entry.properties.dtype], "shape": list(entry.size), "chunks": chunks}
