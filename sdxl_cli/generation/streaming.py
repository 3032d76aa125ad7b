"""A U-Net whose blocks are where they are computed only while they are: the rest stays in the file, or in memory."""

from __future__ import annotations

import torch
from torch import nn

from sdxl_cli.model.blank import blank
from sdxl_cli.model.config import UNetConfig
from sdxl_cli.model.unet import Downsample, ResBlock, TransformerBlock, UNet, Upsample

BLOCKS = (ResBlock, TransformerBlock, Downsample, Upsample)
"""What comes and goes: nearly all of a U-Net's weights are in these."""


def stream(unet: UNet, device: torch.device, dtype: torch.dtype, *, joined: bool = False) -> UNet:
    """Let the blocks come when they are called and go when they are done.

    Args:
        unet: on the CPU, in whatever dtype it is stored in; as views of a mapped file it takes no memory.
        device: where it is to be computed.
        dtype: what it is to be computed in.
        joined: project queries, keys and values together, as :meth:`UNet.join_projections
            <sdxl_cli.model.unet.UNet.join_projections>` has it, so that the results are the same.

    Returns:
        The same U-Net.
    """
    moving = units(unet)
    inside = {id(parameter) for parameters in moving.values() for parameter in parameters}
    for parameter in unet.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(device, dtype)
    for module, parameters in moving.items():
        _attach(module, parameters, device, dtype)
        if joined and isinstance(module, TransformerBlock):
            _join(module)
    return unet


def units(unet: UNet) -> dict[nn.Module, list[nn.Parameter]]:
    """What comes and goes together.

    The layers that read text, timestep and sizes go by themselves: they are called before all steps, outside of
    their block.
    """
    found: dict[nn.Module, list[nn.Parameter]] = {}
    for block in unet.modules():
        if not isinstance(block, BLOCKS):
            continue
        readers: list[nn.Module] = []
        if isinstance(block, TransformerBlock):
            readers = [block.attn2.to_k, block.attn2.to_v]
        if isinstance(block, ResBlock):
            readers = [block.emb_layers[1]]
        found |= {reader: list(reader.parameters()) for reader in readers}
        elsewhere = {id(parameter) for reader in readers for parameter in reader.parameters()}
        found[block] = [p for p in block.parameters() if id(p) not in elsewhere]
    return found


def streamed_bytes(config: UNetConfig, dtype: torch.dtype) -> int:
    """Bytes that are where they are computed at the most: the largest block, and all that is in none."""
    with blank():
        unet = UNet(config)
    sizes = [sum(p.numel() for p in parameters) for parameters in units(unet).values()]
    everything = sum(p.numel() for p in unet.parameters())
    return (everything - sum(sizes) + max(sizes)) * dtype.itemsize


def _attach(
    module: nn.Module, parameters: list[nn.Parameter], device: torch.device, dtype: torch.dtype
) -> None:
    stored = [parameter.data for parameter in parameters]

    def come(_: nn.Module, args: object) -> None:
        for parameter, values in zip(parameters, stored, strict=True):
            parameter.data = values.to(device, dtype)

    def go(_: nn.Module, args: object, output: object) -> None:
        for parameter, values in zip(parameters, stored, strict=True):
            parameter.data = values

    module.register_forward_pre_hook(come)
    module.register_forward_hook(go, always_call=True)


def _join(block: TransformerBlock) -> None:
    """Behind what :func:`_attach` does when the block comes and goes."""

    def come(_: nn.Module, args: object) -> None:
        block.attn1.join()

    def go(_: nn.Module, args: object, output: object) -> None:
        block.attn1.joined = None

    block.register_forward_pre_hook(come)
    block.register_forward_hook(go, always_call=True)
