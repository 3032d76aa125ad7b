"""What a run of the U-Net ships: a whole model, or what a LoRA or an embedding is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.place import SAVE_DTYPES
from sdxl_cli.training.vocabulary import expand

EDM_RANGE = {"edm_vpred.sigma_min": torch.tensor(0.002), "edm_vpred.sigma_max": torch.tensor(120.0)}
"""Tensors by which ComfyUI knows a continuous v model, and the noise levels it then draws from."""


class Export(Protocol):
    """Makes files of what was trained."""

    @property
    def stem(self) -> str:
        """What the files are called: ``model``, ``lora``."""
        ...

    def write(self, path: Path, trained: Mapping[str, Tensor], step: int) -> None:
        """One file that generation reads, of the parameters by name after so many steps."""
        ...

    def arguments(self, path: Path) -> Sequence[str]:
        """What ``sdxl generate`` is told to make pictures with that file."""
        ...

    def asked(
        self, request: GenerateRequest, path: Path, trained: Mapping[str, Tensor], step: int
    ) -> GenerateRequest:
        """The request for a picture of the model in training, with what it needs of the step's file at ``path``."""
        ...


def file_name(export: Export, step: int | None = None) -> str:
    """``model.safetensors`` of the end, ``model-000500.safetensors`` of a step."""
    return f"{export.stem}{'' if step is None else f'-{step:06d}'}.safetensors"


@dataclass(frozen=True, slots=True)
class ModelExport:
    """Writes the whole model with trained parameters in it."""

    model: SDXL
    vae: Autoencoder
    ids: Tensor | None
    """Token ids that the tables were cut down to."""
    config: UNetTrainConfig

    stem = "model"

    def write(self, path: Path, trained: Mapping[str, Tensor], step: int) -> None:
        """See :class:`Export`."""
        model, config = self.model, self.config
        state = {name: value.detach() for name, value in model.state_dict().items()} | dict(trained)
        if self.ids is not None:
            state = expand(state, self.ids, model.config.big_g.vocab_size)
        state |= {f"first_stage_model.{name}": value for name, value in self.vae.state_dict().items()}
        if config.objective == "edm":
            state |= EDM_RANGE
        save_model(
            path,
            state,
            replace(model.config, native_size=config.native_size or model.config.native_size),
            dtype=SAVE_DTYPES[config.save_dtype],
            prediction=config.prediction,
            zero_terminal_snr=config.zero_terminal_snr,
            keep_token_ids=None if model.known_token_ids is None else sorted(model.known_token_ids),
        )

    def arguments(self, path: Path) -> Sequence[str]:
        """See :class:`Export`."""
        return "--model", str(path)

    def asked(
        self, request: GenerateRequest, path: Path, trained: Mapping[str, Tensor], step: int
    ) -> GenerateRequest:
        """See :class:`Export`."""
        return request


@dataclass(frozen=True, slots=True)
class SaveModels:
    """Keeps a file of every so many steps: ``model-000500.safetensors``."""

    export: Export
    folder: Path
    every: int

    def after_step(self, run: Run, done: int) -> None:
        """See :class:`~sdxl_cli.training.loop.Watcher`."""
        if done % self.every == 0 and (shipped := run.shipped()) is not None:
            self.export.write(self.folder / file_name(self.export, done), shipped, done)
