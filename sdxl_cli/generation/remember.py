"""A U-Net that computes once, and not at every step, what does not depend on the latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from sdxl_kernels.graphs import CudaRecorder, Graphs, Record
from torch import Tensor, nn

from sdxl_cli.model.attention import KeysValues
from sdxl_cli.model.unet import Prepared, UNet


@dataclass(slots=True)
class _Known:
    """Conditions that were met, and what was made of them."""

    crossattn: Tensor
    vector: Tensor
    prepared: Prepared
    shifts: dict[int, Tensor] = field(default_factory=dict)
    """By timestep."""


class Remembering:
    """A network for one run, which meets the same few conditions again and again."""

    def __init__(self, unet: UNet, recorded: RecordedSteps | None = None) -> None:
        """``recorded`` replays the steps of the same U-Net, and may outlive the run."""
        self.unet, self.recorded = unet, recorded
        self._known: list[_Known] = []

    def __call__(self, x: Tensor, index: int, crossattn: Tensor, vector: Tensor) -> Tensor:
        """See :data:`sdxl_cli.diffusion.denoiser.Network`."""
        known = self.expect(crossattn, vector, [index])
        step = self.recorded or self.unet.step
        return step(x, known.shifts[index], known.prepared)

    def expect(self, crossattn: Tensor, vector: Tensor, indices: Sequence[int]) -> _Known:
        """Compute what these conditions and timesteps need, unless it was; the first time, the host waits."""
        known = self._met(crossattn, vector)
        new = [index for index in indices if index not in known.shifts]
        # sums are ordered by the number of rows: on a CPU a timestep has the same bits whatever others there are
        for some in [[index] for index in new] if vector.device.type == "cpu" else [new] if new else []:
            timesteps = [torch.full((len(vector),), index, device=vector.device) for index in some]
            shifts = self.unet.shifts(torch.stack(timesteps), known.prepared)
            known.shifts.update(zip(some, shifts, strict=True))
        return known

    def _met(self, crossattn: Tensor, vector: Tensor) -> _Known:
        # by identity: comparing values would make an accelerator wait
        for known in self._known:
            if known.crossattn is crossattn and known.vector is vector:
                return known
        self._known.append(_Known(crossattn, vector, self.unet.prepare(crossattn, vector)))
        return self._known[-1]


class RecordedSteps:
    """The steps of a U-Net, recorded at the first of each shape; for as long as its weights stay where they are."""

    def __init__(self, unet: UNet, record: Record | None = None) -> None:
        """``record`` is how; by default as CUDA graphs."""
        self.unet = unet
        self._blocks: list[nn.Module] = []
        self._graphs = Graphs(self._work, record or CudaRecorder(next(unet.parameters()).device))

    def __call__(self, x: Tensor, shifts: Tensor, prepared: Prepared) -> Tensor:
        """As :meth:`UNet.step <sdxl_cli.model.unet.UNet.step>`."""
        self._blocks = list(prepared.keys_values)
        pairs = prepared.keys_values.values()
        kept = [prepared.label, *(tensor for pair in pairs for tensor in (pair.keys, pair.values))]
        return self._graphs([x, shifts], kept, prepared)

    def _work(self, changing: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        pairs = (KeysValues(*pair) for pair in zip(kept[1::2], kept[2::2], strict=True))
        x, shifts = changing
        return self.unet.step(x, shifts, Prepared(kept[0], dict(zip(self._blocks, pairs, strict=True))))
