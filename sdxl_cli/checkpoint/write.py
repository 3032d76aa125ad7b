"""Models to files: the original single-file layout, written tensor by tensor, whole or not at all.

Metadata: https://github.com/Stability-AI/ModelSpec 1.0.1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from sdxl_cli import __version__
from sdxl_cli.checkpoint import vocabulary
from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.checkpoint.identify import CLIP_L, CONFIG_KEY, TEXT, TOKEN_IDS, VAE, Prediction
from sdxl_cli.checkpoint.tensor_file import DTYPES
from sdxl_cli.errors import SdxlError
from sdxl_cli.model.config import BASE, REFINER, ModelConfig, VAEConfig
from sdxl_cli.model.sdxl import SDXL

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HASH_KEY = "modelspec.hash_sha256"
_NO_HASH = "0x" + "0" * 64
_CHUNK = 1 << 24
"""Bytes written at a time."""


def save_model(
    path: Path | str,
    model: SDXL | Mapping[str, Tensor],
    config: ModelConfig,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    title: str | None = None,
    prediction: Prediction = "eps",
    keep_token_ids: Sequence[int] | None = None,
) -> None:
    """Write a model, with the parts it has, as one file in the released layout.

    Args:
        path: replaced when it exists.
        model: or its state dict, in original names.
        config: the sizes; written into the metadata unless they are the released ones.
        dtype: casts floating-point tensors, one at a time; None keeps each one's own.
        metadata: added to, and stronger than, what is written anyway.
        title: ``modelspec.title``; default the file's name.
        prediction: what the U-Net predicts.
        keep_token_ids: write only these rows of the token tables (see :mod:`sdxl_cli.checkpoint.vocabulary`);
            default: those the model was loaded with.

    Raises:
        FileError, SdxlError: the file cannot be written, or the disk is full.
    """
    state = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    if keep_token_ids is None and isinstance(model, SDXL) and model.known_token_ids is not None:
        keep_token_ids = sorted(model.known_token_ids)
    if config.clip_l and any(name.startswith(TEXT) for name in state):
        # no network uses it, but the released file has it and strict readers of that layout want it
        positions = torch.arange(config.clip_l.context_length)[None]
        state.setdefault(f"{CLIP_L}text_model.embeddings.position_ids", positions)
    if keep_token_ids is not None:
        state |= _pruned(state, config, keep_token_ids)
    notes = _modelspec(Path(path), config, title) | {
        "modelspec.prediction_type": {"eps": "epsilon", "v": "v"}[prediction]
    }
    if config not in (BASE, REFINER):
        notes[CONFIG_KEY] = json.dumps(config.to_dict())
    save_tensors(path, state, notes | dict(metadata or {}), dtype=dtype)


def save_vae(
    path: Path | str,
    vae: nn.Module | Mapping[str, Tensor],
    config: VAEConfig,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    title: str | None = None,
) -> None:
    """Write an autoencoder alone, with the bare names of the released ``sdxl_vae.safetensors``.

    Args:
        path: replaced when it exists.
        vae: or its state dict, with or without ``first_stage_model.``.
        config: the sizes and the scale factor; written into the metadata unless they are the released ones.
        dtype: see :func:`save_model`.
        metadata: see :func:`save_model`.
        title: see :func:`save_model`.

    Raises:
        FileError, SdxlError: the file cannot be written, or the disk is full.
    """
    state = vae.state_dict() if isinstance(vae, nn.Module) else vae
    notes = _modelspec(Path(path), BASE, title)
    notes["modelspec.architecture"] = f"{notes['modelspec.architecture']}/vae"
    if config != BASE.vae:
        notes[CONFIG_KEY] = json.dumps({"vae": asdict(config)})
    bare = {name.removeprefix(VAE): tensor for name, tensor in state.items()}
    save_tensors(path, bare, notes | dict(metadata or {}), dtype=dtype)


def save_tensors(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors, on whatever device they are, as safetensors; one at a time, so without a second copy of all.

    Args:
        path: replaced when it exists; see :func:`sdxl_cli.checkpoint.atomic.atomic_write`.
        tensors: by name.
        metadata: text by name; ``modelspec.hash_sha256``, the hash of all tensor bytes, is added.
        dtype: casts floating-point tensors; None keeps each one's own.

    Raises:
        FileError: the file cannot be written.
        SdxlError: the disk is full.
    """
    path = Path(path)
    order = sorted(tensors, key=lambda name: (-_stored_dtype(tensors[name], dtype).itemsize, name))
    notes = {str(key): str(value) for key, value in (metadata or {}).items()} | {_HASH_KEY: _NO_HASH}
    header = _header({name: tensors[name] for name in order}, notes, dtype)
    size = len(header) + sum(_bytes(tensors[name], dtype) for name in order)
    with atomic_write(path) as temporary:
        free = shutil.disk_usage(temporary.parent).free
        if free < size:
            raise SdxlError(
                f"{path} needs {format_bytes(size)}, the disk has {format_bytes(free)} free; make room"
            )
        with temporary.open("wb") as file:
            file.write(header)
            digest = _write_all(file, (tensors[name] for name in order), dtype)
            file.seek(0)
            file.write(header.replace(_NO_HASH.encode(), f"0x{digest}".encode(), 1))


def _write_all(file: BinaryIO, tensors: Iterator[Tensor], dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        stored = tensor.detach().to(dtype=_stored_dtype(tensor, dtype)).cpu().contiguous()
        data = memoryview(stored.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(data), _CHUNK):
            digest.update(data[start : start + _CHUNK])
            file.write(data[start : start + _CHUNK])
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + _bytes(tensor, dtype)
        stored = _NAMES[_stored_dtype(tensor, dtype)]
        table[name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    return len(text).to_bytes(8, "little") + text


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * _stored_dtype(tensor, dtype).itemsize


def _pruned(state: Mapping[str, Tensor], config: ModelConfig, ids: Sequence[int]) -> dict[str, Tensor]:
    keep = vocabulary.token_ids(ids, config.big_g.vocab_size)
    changed = {
        name: vocabulary.pruned(state[name], keep) for name in vocabulary.tables(config) if name in state
    }
    return changed | ({TOKEN_IDS: keep} if changed else {})


def _modelspec(path: Path, config: ModelConfig, title: str | None) -> dict[str, str]:
    """What the specification demands or advises, as far as a program can know it."""
    architecture = f"stable-diffusion-xl-v1-{'refiner' if config.is_refiner else 'base'}"
    if config not in (BASE, REFINER):
        # other programs must not take it for the released size
        architecture += "/other-size"
    notes = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title or path.stem,
        "modelspec.resolution": f"{config.native_size}x{config.native_size}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "sdxl.version": __version__,
    }
    if config.is_refiner:
        notes["modelspec.timestep_range"] = "0,199"  # the noise levels it is trained on, paper section 2.5
    return notes
