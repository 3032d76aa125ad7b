"""What a conversion reads: every tensor of a model, what it will be stored as, and what has to travel as a note.

A single file and a diffusers folder do not hold quite the same: the folder has no place for a few small tensors, such
as OpenCLIP's ``logit_scale``, for a pruned vocabulary, or for the file's metadata. They travel as notes in the folder's
first file, so that the way there and back gives the same file again, to the bit.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdxl_cli.checkpoint import vocabulary
from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.finite import count_non_finite
from sdxl_cli.checkpoint.identify import CLIP_L, TOKEN_IDS, V_KEY, VAE, ZERO_SNR_KEY
from sdxl_cli.checkpoint.read import open_tensors
from sdxl_cli.checkpoint.stream import Pending
from sdxl_cli.checkpoint.tensor_file import DTYPES, StreamedFile, Tensors
from sdxl_cli.checkpoint.vocabulary import Expanded
from sdxl_cli.checkpoint.write import PREDICTION_NAMES, config_note, modelspec
from sdxl_cli.errors import FileError, NumericError, UsageError
from sdxl_cli.model.config import ALL_PARTS, PREFIXES, ModelConfig, Part

Layout = Literal["single", "diffusers"]
Storage = Literal["fp32", "fp16", "bf16", "fp8_e4m3"]

STORAGES: dict[Storage, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""What the weights may be stored as."""
LEFT_OUT = "sdxl.left_out"
"""Metadata of a folder: the tensors of the single file that it has no place for, as JSON."""
MAX_LEFT_OUT = 1 << 20
"""Bytes of such a tensor; larger ones, such as averaged weights, are not carried along."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to be converted to what."""

    source: ModelFiles
    target: Path
    """A file for ``single``, a folder for ``diffusers``; must not exist."""
    layout: Layout
    dtype: Storage | None = None
    """None keeps every tensor's own."""
    parts: tuple[Part, ...] = ALL_PARTS
    variant: str | None = None
    """``fp16`` names the folder's files ``….fp16.safetensors``."""
    max_shard_size: int = 0
    """Bytes of a file of the folder, 0 for any."""


@dataclass
class Findings:
    """What was noticed while the tensors went by."""

    not_finite: list[str] = field(default_factory=list)
    """Tensors with NaN or infinity in the source. Looked for only where there is a cast."""
    dropped: list[str] = field(default_factory=list)
    """Large tensors that belong to no part of SDXL and have no place in a folder."""


@dataclass(frozen=True)
class Source:
    """The tensors of a model as they are to be written, under the names of the single file."""

    tensors: Tensors
    pending: dict[str, Pending]
    metadata: dict[str, str]
    left_out: dict[str, Tensor] | None
    """Tensors that an earlier conversion to a folder wrote down; None when the source is no such folder."""


def parts_of(files: ModelFiles, asked: tuple[Part, ...] | None) -> tuple[Part, ...]:
    """The parts to convert: those asked for, else all that there are.

    Raises:
        UsageError: the file has not got one of them.
    """
    there: tuple[Part, ...] = ("vae",) if files.identity.kind == "vae" else ALL_PARTS
    for part in asked or ():
        if part not in there:
            raise UsageError(f"--parts {part}: {files.path} is {files.identity.label} and has no such part")
    return tuple(part for part in there if asked is None or part in asked)


def open_source(job: Conversion, findings: Findings, done: Callable[[int], None]) -> Source:
    """Find the tensors to write and what each will be stored as; nothing is read yet.

    Args:
        job: what is asked for.
        findings: filled while the tensors are read.
        done: called with the bytes of each tensor that was made.

    Raises:
        FileError: a file of the source is damaged.
    """
    tensors = open_tensors(job.source, StreamedFile)
    kept = [name for name in tensors.shapes if _is_wanted(name, job.parts)]
    pending = {}
    for name in kept:
        stored = stored_dtype(name, tensors, job.dtype)
        make = partial(_read, tensors, name, stored, findings, done)
        pending[name] = Pending(stored, tensors.shapes[name], make)
    metadata = {key: value for key, value in tensors.metadata.items() if key not in ("format", LEFT_OUT)}
    carried = tensors.metadata.get(LEFT_OUT)
    try:
        left_out = None if carried is None else _unpacked(carried)
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{job.source.path}: its metadata {LEFT_OUT} is damaged ({error})") from error
    return Source(tensors, pending, metadata, left_out)


def stored_dtype(name: str, tensors: Tensors, dtype: Storage | None) -> torch.dtype:
    """What a tensor is to be stored as.

    Integers, and tensors of no part such as schedules, stay as they are. ``fp8_e4m3`` is for the matrices and
    kernels of the U-Net and the text encoders, as in the files people share: what is added or multiplied elementwise
    costs little room and much precision, and the autoencoder most of all; they become fp16.
    """
    own = DTYPES[tensors.dtypes[name]]
    if dtype is None or not own.is_floating_point or not name.startswith(tuple(PREFIXES.values())):
        return own
    if dtype == "fp8_e4m3" and (name.startswith(VAE) or len(tensors.shapes[name]) < 2 or "embedding" in name):
        return torch.float16
    return STORAGES[dtype]


def single_file(job: Conversion, source: Source) -> tuple[dict[str, Pending], dict[str, str]]:
    """The tensors and the metadata of the single file; an autoencoder alone has the released bare names."""
    config, pending = job.source.config, dict(source.pending)
    if job.parts == ("vae",):
        bare = {name.removeprefix(VAE): tensor for name, tensor in pending.items() if name.startswith(VAE)}
        return bare, _described(job, source.metadata)
    if source.left_out is not None:
        restored = {name: tensor for name, tensor in source.left_out.items() if _is_wanted(name, job.parts)}
        pending |= {name: _there(tensor) for name, tensor in restored.items()}
        if TOKEN_IDS in restored:
            pending |= _pruned(pending, config, restored[TOKEN_IDS])
    elif job.source.layout == "diffusers":
        pending |= _never_in_a_folder(job, config)
    return pending, _described(job, source.metadata)


def left_out(job: Conversion, source: Source, used: set[str], findings: Findings) -> dict[str, str]:
    """The note on what the folder has no place for; ``used`` are the names it has a place for."""
    kept: dict[str, Tensor] = dict(source.left_out or {})
    for name in source.pending:
        if name in used:
            continue
        if source.pending[name].size > MAX_LEFT_OUT:
            findings.dropped.append(name)
        else:
            kept[name] = source.tensors.read(name)
    if job.source.layout == "diffusers" and source.left_out is None:
        return {}
    return {LEFT_OUT: json.dumps({name: _packed(tensor) for name, tensor in sorted(kept.items())})}


def full_tables(source: Source, config: ModelConfig) -> Source:
    """The same with token tables of the whole vocabulary, which is all that other programs know."""
    if TOKEN_IDS not in source.pending:
        return source
    tensors, ids = Expanded(source.tensors, config), source.tensors.read(TOKEN_IDS)
    pending = dict(source.pending)
    for name in vocabulary.tables(config):
        if name in pending:
            make = partial(_expanded, pending[name], ids, tensors.shapes[name][0])
            pending[name] = replace(pending[name], shape=tensors.shapes[name], make=make)
    return replace(source, pending=pending)


def _described(job: Conversion, metadata: Mapping[str, str]) -> dict[str, str]:
    """The source's own notes, over what a file must say of itself to be read again."""
    config, is_vae = job.source.config, job.parts == ("vae",)
    notes = modelspec(job.target, config, None) if "modelspec.architecture" not in metadata else {}
    if is_vae and notes:
        notes["modelspec.architecture"] += "/vae"
    if not is_vae and job.source.prediction != "eps":
        notes["modelspec.prediction_type"] = PREDICTION_NAMES[job.source.prediction]
    stated = config_note(config.vae if is_vae else config)
    return notes | dict(metadata) | stated


def _is_wanted(name: str, parts: tuple[Part, ...]) -> bool:
    if name == TOKEN_IDS:
        return "text" in parts
    prefixes = tuple(PREFIXES[part] for part in parts)
    # what belongs to no part says something of the U-Net: what it predicts, its schedule
    return name.startswith(prefixes) or ("unet" in parts and not name.startswith(tuple(PREFIXES.values())))


def _read(
    tensors: Tensors, name: str, dtype: torch.dtype, findings: Findings, done: Callable[[int], None]
) -> Tensor:
    """One tensor in its new dtype; what does not fit into that is an error, what was broken before is noted."""
    tensor = tensors.read(name, dtype)
    done(tensor.numel() * tensor.element_size())
    if tensors.dtypes[name] != _NAMES[dtype] and _is_full(tensor):
        before = tensors.read(name)
        largest = float(before.to(torch.float32).abs().max())
        if any(count_non_finite(before)):
            findings.not_finite.append(name)
        elif largest > torch.finfo(dtype).max:
            raise NumericError(
                f"{name} reaches {largest:g}, more than {str(dtype).removeprefix('torch.')} can hold "
                f"({torch.finfo(dtype).max:g}); convert to bf16 or fp32"
            )
    return tensor


def _is_full(tensor: Tensor) -> bool:
    """Whether a cast may have met a number too large for it: infinity, NaN, or, where torch saturates, the largest."""
    if tensor.dtype == torch.float8_e4m3fn and bool(((tensor.view(torch.uint8) & 0x7F) == 0x7E).any()):
        return True
    return any(count_non_finite(tensor))


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _there(tensor: Tensor) -> Pending:
    return Pending(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _never_in_a_folder(job: Conversion, config: ModelConfig) -> dict[str, Pending]:
    """What the released single file has beside what a folder of other programs has."""
    added: dict[str, Tensor] = {}
    if config.clip_l and "text" in job.parts:
        positions = torch.arange(config.clip_l.context_length)[None]
        added[f"{CLIP_L}text_model.embeddings.position_ids"] = positions
    if "unet" in job.parts:
        # a single file has no scheduler's configuration; these names stand for it in every front end
        if job.source.prediction == "v":
            added[V_KEY] = torch.empty(0)
        if job.source.identity.zero_terminal_snr:
            added[ZERO_SNR_KEY] = torch.empty(0)
    return {name: _there(tensor) for name, tensor in added.items()}


def _pruned(pending: Mapping[str, Pending], config: ModelConfig, ids: Tensor) -> dict[str, Pending]:
    changed = {}
    for name in vocabulary.tables(config):
        if name in pending:
            table = pending[name]
            shape = (len(ids) + 1, *table.shape[1:])
            changed[name] = replace(table, shape=shape, make=partial(_pruned_table, table, ids))
    return changed


def _pruned_table(table: Pending, ids: Tensor) -> Tensor:
    return vocabulary.pruned(table.make(), ids)


def _expanded(table: Pending, ids: Tensor, rows: int) -> Tensor:
    return vocabulary.expanded(table.make(), ids, rows)


def _packed(tensor: Tensor) -> dict[str, Any]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": _NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }


def _unpacked(text: str) -> dict[str, Tensor]:
    found = {}
    for name, value in json.loads(text).items():
        data = bytearray(base64.b64decode(value["data"], validate=True))
        dtype = DTYPES[value["dtype"]]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        found[str(name)] = flat.reshape(value["shape"])
    return found
