"""The U-Net's linear layers, laid out once as the processor multiplies them; for inference on a CPU."""

from __future__ import annotations

from sdxl_kernels.prepacked import prepack, prepacked_linear
from torch import Tensor, nn

ONCE_A_PROMPT = ("attn2.to_k", "attn2.to_v")
"""Layers that read the text, not the picture: packing them takes longer than it wins."""


class PrepackedLinear(nn.Module):
    """A linear layer without its weight: what is left is a copy that only oneDNN can read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # not a buffer: it can be neither moved, nor cast, nor saved
        self.packed = prepack(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., D]."""
        return prepacked_linear(x, self.packed, self.bias)


def packable(unet: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a U-Net's transformers that are computed at every step, by name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear)
        and ("transformer_blocks." in name or name.endswith((".proj_in", ".proj_out")))
        and not name.endswith(ONCE_A_PROMPT)
    }


def packed_bytes(unet: nn.Module) -> int:
    """What their copies take; the originals go."""
    return sum(linear.weight.numel() * linear.weight.element_size() for linear in packable(unet).values())


def prepack_linears(unet: nn.Module) -> None:
    """Replace the layers by packed ones, one at a time, so that no more than one is there twice."""
    for name in list(packable(unet)):
        parent, _, last = name.rpartition(".")
        linear = unet.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(unet.get_submodule(parent), last, PrepackedLinear(linear))
