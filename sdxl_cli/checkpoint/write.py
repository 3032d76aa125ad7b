"""Models to files: the original single-file layout, written tensor by tensor, whole or not at all.

Metadata: https://github.com/Stability-AI/ModelSpec 1.0.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sdxl_cli import __version__
from sdxl_cli.checkpoint import vocabulary
from sdxl_cli.checkpoint.identify import (
    CLIP_L,
    CONFIG_KEY,
    TEXT,
    TOKEN_IDS,
    V_KEY,
    VAE,
    ZERO_SNR_KEY,
    Prediction,
)
from sdxl_cli.checkpoint.stream import Pending, write_pending
from sdxl_cli.model.config import BASE, REFINER, ModelConfig, VAEConfig
from sdxl_cli.model.sdxl import SDXL

PREDICTION_NAMES: dict[Prediction, str] = {"eps": "epsilon", "v": "v", "x0": "sample"}
"""``modelspec.prediction_type``."""


def save_model(
    path: Path | str,
    model: SDXL | Mapping[str, Tensor],
    config: ModelConfig,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    title: str | None = None,
    prediction: Prediction = "eps",
    zero_terminal_snr: bool = False,
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
        zero_terminal_snr: whether it was trained down to pure noise.
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
    # other programs know these kinds by tensors without content
    marks = ((V_KEY, prediction == "v"), (ZERO_SNR_KEY, zero_terminal_snr))
    state |= {name: torch.zeros(0) for name, on in marks if on}
    if keep_token_ids is not None:
        state |= _pruned(state, config, keep_token_ids)
    notes = modelspec(Path(path), config, title) | {"modelspec.prediction_type": PREDICTION_NAMES[prediction]}
    save_tensors(path, state, notes | config_note(config) | dict(metadata or {}), dtype=dtype)


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
    notes = modelspec(Path(path), BASE, title) | config_note(config)
    notes["modelspec.architecture"] = f"{notes['modelspec.architecture']}/vae"
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
    pending = {
        name: Pending(_stored_dtype(tensor, dtype), tuple(tensor.shape), partial(_same, tensor))
        for name, tensor in tensors.items()
    }
    write_pending(path, pending, metadata)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _pruned(state: Mapping[str, Tensor], config: ModelConfig, ids: Sequence[int]) -> dict[str, Tensor]:
    keep = vocabulary.token_ids(ids, config.big_g.vocab_size)
    changed = {
        name: vocabulary.pruned(state[name], keep) for name in vocabulary.tables(config) if name in state
    }
    return changed | ({TOKEN_IDS: keep} if changed else {})


def config_note(config: ModelConfig | VAEConfig) -> dict[str, str]:
    """The metadata that states sizes; empty for the released ones, with any number of input channels."""
    if isinstance(config, VAEConfig):
        return {} if config == BASE.vae else {CONFIG_KEY: json.dumps({"vae": asdict(config)})}
    return {} if _is_released(config) else {CONFIG_KEY: json.dumps(config.to_dict())}


def _is_released(config: ModelConfig) -> bool:
    """Whether the sizes are the released ones; the input channels can be told from the first convolution."""
    return replace(config, unet=replace(config.unet, in_channels=4)) in (BASE, REFINER)


def modelspec(path: Path, config: ModelConfig, title: str | None) -> dict[str, str]:
    """What the specification demands or advises, as far as a program can know it."""
    architecture = f"stable-diffusion-xl-v1-{'refiner' if config.is_refiner else 'base'}"
    if not _is_released(config):
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
