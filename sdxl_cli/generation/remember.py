"""A U-Net that makes of its conditions once, and not at every step, what does not depend on the step."""

from __future__ import annotations

from collections.abc import Sequence

from sdxl_kernels.graphs import CudaRecorder, Graphs, Record
from torch import Tensor, nn

from sdxl_cli.model.attention import KeysValues
from sdxl_cli.model.unet import Prepared, UNet


class Remembering:
    """A network for one run, which meets the same few conditions again and again."""

    def __init__(self, unet: UNet, recorded: RecordedSteps | None = None) -> None:
        """``recorded`` replays the steps of the same U-Net, and may outlive the run."""
        self.unet, self.recorded = unet, recorded
        self._known: list[tuple[Tensor, Tensor, Prepared]] = []

    def __call__(self, x: Tensor, indices: Tensor, crossattn: Tensor, vector: Tensor) -> Tensor:
        """See :data:`sdxl_cli.diffusion.denoiser.Network`."""
        step = self.recorded or self.unet.step
        return step(x, indices, self._prepared(crossattn, vector))

    def _prepared(self, crossattn: Tensor, vector: Tensor) -> Prepared:
        # by identity: comparing values would make an accelerator wait
        for text, numbers, prepared in self._known:
            if text is crossattn and numbers is vector:
                return prepared
        made = self.unet.prepare(crossattn, vector)
        self._known.append((crossattn, vector, made))
        return made


class RecordedSteps:
    """The steps of a U-Net, recorded at the first of each shape; for as long as its weights stay where they are."""

    def __init__(self, unet: UNet, record: Record | None = None) -> None:
        """``record`` is how; by default as CUDA graphs."""
        self.unet = unet
        self._blocks: list[nn.Module] = []
        self._graphs = Graphs(self._work, record or CudaRecorder(next(unet.parameters()).device))

    def __call__(self, x: Tensor, timesteps: Tensor, prepared: Prepared) -> Tensor:
        """As :meth:`UNet.step <sdxl_cli.model.unet.UNet.step>`."""
        self._blocks = list(prepared.keys_values)
        pairs = prepared.keys_values.values()
        kept = [prepared.label, *(tensor for pair in pairs for tensor in (pair.keys, pair.values))]
        return self._graphs([x, timesteps], kept, prepared)

    def _work(self, changing: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        pairs = (KeysValues(*pair) for pair in zip(kept[1::2], kept[2::2], strict=True))
        x, timesteps = changing
        return self.unet.step(x, timesteps, Prepared(kept[0], dict(zip(self._blocks, pairs, strict=True))))
