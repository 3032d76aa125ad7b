"""LoRA training, as far as it differs from training a whole model: where it begins, and what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.lora import Lora
from sdxl_cli.checkpoint.lora_keys import LoraLayer
from sdxl_cli.checkpoint.lora_write import LoraChange, LoraPlace, save_lora
from sdxl_cli.console import get as console
from sdxl_cli.data.manifest import Manifest
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.adapted import Adapter
from sdxl_cli.training.adapters import adapter_counts, add_adapters
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.lora_notes import step_notes, training_notes
from sdxl_cli.training.parts import trained_parts
from sdxl_cli.training.place import SAVE_DTYPES
from sdxl_cli.training.session import ALL, Share
from sdxl_cli.training.unet_request import UNetRequest, base_of

Adapters = Mapping[str, tuple[LoraPlace, Adapter]]
"""How the names of an adapter's parameters begin -> the names that files have for its layer, and the adapter."""


def learn_lora(
    request: UNetRequest, model: SDXL, manifest: Manifest, batches_per_epoch: int, share: Share = ALL
) -> LoraExport:
    """Give a model the adapters that a request asks for, with the values of a LoRA that it goes on from.

    Args:
        request: has a rank.
        model: changed in place; all but the adapters is frozen.
        manifest: what it is trained on, for the file's metadata.
        batches_per_epoch: of each process; likewise.
        share: how batches are dealt out to processes; likewise.

    Returns:
        What writes the adapters.

    Raises:
        UsageError: the configuration and the file or the model do not fit together.
        FileError: the file to go on from is damaged or no LoRA.
    """
    config = request.config
    adapters = add_adapters(model, config.lora, trained_parts(config, model.config))
    if not adapters:
        raise UsageError("lora.targets name no layer of the networks that are trained")
    if request.lora:
        load_lora(Path(request.lora), adapters)
    base = base_of(request)
    console().note(f"LoRA for {base.describe()}: {adapter_counts(adapters)}")
    notes = training_notes(config, model.config, base, manifest, share)
    batches = config.loop.batches_per_step(share.began_with) * share.parts
    return LoraExport(model, adapters, base, config, notes, batches, batches_per_epoch)


@torch.no_grad()
def load_lora(path: Path, adapters: Adapters) -> None:
    """Let adapters begin with what a LoRA has learned. Layers that it lacks begin without a change.

    Raises:
        FileError: no LoRA, or one of layers that the adapters lack.
        UsageError: its rank or alpha is another one.
    """
    lora = Lora(path)
    table = {name: entry for entry in adapters.values() for name in _names(entry[0])}
    strangers = [layer.name for layer in lora.layers if (layer.scope, layer.module) not in table]
    if strangers:
        raise FileError(
            f"{path}: {len(strangers)} of its {len(lora.layers)} layers are not trained here, {strangers[0]} is the "
            "first; name them in lora.targets (and give --train-text-encoders for those of text encoders)"
        )
    for layer in lora.layers:
        _take(lora, layer, table[layer.scope, layer.module][1])
    fresh = len(adapters) - len(lora.layers)
    console().note(
        f"goes on from {path}, {lora.kind}" + (f"; {fresh} layers that it lacks begin anew" if fresh else "")
    )


def _names(place: LoraPlace) -> list[tuple[str, str]]:
    """The layer as :mod:`~sdxl_cli.checkpoint.lora_keys` writes it, whichever program wrote the file."""
    flat = [name.replace(".", "_") for name in (place.path, place.diffusers)]
    flat += [name.removeprefix("text_model_") for name in flat]
    return [(place.scope, name) for name in dict.fromkeys(flat)]


def _take(lora: Lora, layer: LoraLayer, adapter: Adapter) -> None:
    numbers = lora.numbers(layer)
    rank, alpha = numbers.get("rank"), numbers.get("alpha", numbers.get("rank", 0.0))
    dora = next((role for role in ("dora_scale", "magnitude") if role in layer.keys), None)
    if (rank, alpha) != (adapter.rank, adapter.alpha) or bool(dora) != (adapter.magnitude is not None):
        raise UsageError(
            f"{lora.path}: {layer.name} has rank {rank or 'none'}, alpha {alpha:g}{' and DoRA' if dora else ''}; here "
            f"it has rank {adapter.rank}, alpha {adapter.alpha:g}{'' if adapter.magnitude is None else ' and DoRA'}; "
            f"give --rank, --alpha and --dora as they are in the file"
        )
    for role, parameter in (("down", adapter.down), ("up", adapter.up), (dora, adapter.magnitude)):
        if role is None or parameter is None:
            continue
        value = lora.tensors.read(layer.keys[role], torch.float32) if role in layer.keys else torch.empty(0)
        if value.numel() != parameter.numel():
            raise FileError(f"{lora.path}: {layer.name} is of another shape than the layer here")
        parameter.copy_(value.reshape(parameter.shape))


@dataclass(frozen=True, slots=True)
class LoraExport:
    """Writes trained adapters as a LoRA file."""

    model: SDXL
    adapters: Adapters
    base: ModelFiles
    config: UNetTrainConfig
    notes: Mapping[str, str]
    """Metadata about the training."""
    batches_per_step: int
    """Of each process, as are those of an epoch."""
    batches_per_epoch: int

    stem = "lora"
    """What its files are called."""

    def write(self, path: Path, trained: Mapping[str, Tensor], step: int) -> None:
        """See :class:`~sdxl_cli.training.export.Export`."""
        changes = [
            LoraChange(
                place,
                trained[f"{start}down"].detach(),
                trained[f"{start}up"].detach(),
                adapter.alpha,
                trained[f"{start}magnitude"].detach() if adapter.magnitude is not None else None,
            )
            for start, (place, adapter) in self.adapters.items()
        ]
        # front ends list a LoRA by this name: that of the run, as all runs have a lora.safetensors
        name = path.absolute().parent.name + (
            "" if path.stem == self.stem else path.stem.removeprefix(self.stem)
        )
        epoch = step * self.batches_per_step // self.batches_per_epoch
        save_lora(
            path,
            changes,
            self.model.config,
            layout=self.config.lora.layout,
            dtype=SAVE_DTYPES[self.config.save_dtype],
            title=name,
            metadata={**self.notes, **step_notes(step, epoch, name)},
        )

    def arguments(self, path: Path) -> Sequence[str]:
        """See :class:`~sdxl_cli.training.export.Export`."""
        name = "bundled" if self.base.is_bundled else str(self.base.path)
        return "--model", name, "--lora", str(path)

    def asked(
        self, request: GenerateRequest, path: Path, trained: Mapping[str, Tensor], step: int
    ) -> GenerateRequest:
        """See :class:`~sdxl_cli.training.export.Export`."""
        return request
