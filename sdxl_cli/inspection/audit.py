"""How large a network's numbers get, layer by layer, beside the largest that fp16 has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_cli.model.vae import Autoencoder

FP16_MAX = 65504.0
"""The largest number of fp16; what is beyond becomes infinite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A layer of a network."""

    name: str
    kind: str
    """Its class."""
    largest: float
    """The largest of its outputs, without the sign; infinite where one was not finite."""
    at: str
    """What it was given when it said that."""

    @property
    def overflows(self) -> bool:
        """Whether fp16 has no such number."""
        return self.largest > FP16_MAX


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """The layers of a network, in the order they ran."""

    network: str
    """``autoencoder`` or ``U-Net``."""
    runs: int
    """How often it ran."""
    layers: tuple[Layer, ...]
    overflowing: tuple[str, ...]
    """Names of the layers whose outputs fp16 does not have."""

    def loudest(self, count: int) -> list[Layer]:
        """Those with the largest numbers."""
        return sorted(self.layers, key=lambda layer: -layer.largest)[:count]

    @property
    def verdict(self) -> str:
        """In a sentence."""
        top = self.loudest(1)[0]
        if not self.overflowing:
            return (
                f"{self.network}: no layer leaves fp16; the largest, {top.name}, has {top.largest:.4g}, "
                f"{100 * top.largest / FP16_MAX:.2g} % of {FP16_MAX:g}"
            )
        names = ", ".join(self.overflowing[:3]) + (" …" if len(self.overflowing) > 3 else "")
        return (
            f"{self.network}: {len(self.overflowing)} of {len(self.layers)} layers leave fp16 ({names}); "
            f"largest {top.largest:.4g} in {top.name}; run it in bf16 or fp32"
        )


class _Watch:
    """Notes the largest output of every module below a network."""

    def __init__(self) -> None:
        self.largest: dict[str, tuple[float, str, str]] = {}
        """Name -> (largest, class, given what)."""
        self.given = ""
        self._last: Any = None

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Watch while the block runs."""
        handles = [
            module.register_forward_hook(self._hook(name)) for name, module in network.named_modules() if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, _: Any, output: Any) -> None:
            # what a block hands on from its last layer is that layer's
            if not isinstance(output, Tensor) or output is self._last:
                return
            self._last = output
            peak = float(output.detach().abs().max())
            peak = peak if peak == peak else float("inf")  # NaN comes of infinities
            before = self.largest.get(name)
            if before is None or peak > before[0]:
                self.largest[name] = (peak, type(module).__name__, self.given)

        return see

    def audit(self, network: str, runs: int) -> Audit:
        """What was seen."""
        layers = tuple(
            Layer(name=name, kind=kind, largest=peak, at=at)
            for name, (peak, kind, at) in self.largest.items()
        )
        return Audit(
            network=network,
            runs=runs,
            layers=layers,
            overflowing=tuple(layer.name for layer in layers if layer.overflows),
        )


@torch.inference_mode()
def audit_vae(vae: Autoencoder, pictures: Sequence[tuple[str, Tensor]]) -> Audit:
    """Encode and decode pictures, watching.

    Args:
        vae: in fp32 or bf16, where nothing overflows.
        pictures: (name, [3, H, W] in -1 … 1); sides multiples of the downsampling factor.
    """
    watch = _Watch()
    device = next(vae.parameters()).device
    with watch.on(vae):
        for watch.given, image in pictures:
            vae.decode(vae.encode(image[None].to(device)).mode())
    return watch.audit("autoencoder", len(pictures))


@torch.inference_mode()
def audit_decoder(vae: Autoencoder, latents: Sequence[tuple[str, Tensor]]) -> Audit:
    """Decode latents (name, unscaled [z, h, w]), watching; see :func:`audit_vae`."""
    watch = _Watch()
    device = next(vae.parameters()).device
    with watch.on(vae):
        for watch.given, latent in latents:
            vae.decode(latent[None].to(device))
    return watch.audit("autoencoder", len(latents))


@torch.inference_mode()
def audit_unet(
    unet: nn.Module,
    denoise: Callable[[Tensor, float], Tensor],
    points: Sequence[tuple[str, Tensor, float]],
) -> Audit:
    """Let a denoiser work at some noise levels, watching its U-Net.

    Args:
        unet: the network inside ``denoise``, in fp32 or bf16.
        denoise: (x [B, z, h, w], sigma) -> denoised.
        points: (name, x, sigma).
    """
    watch = _Watch()
    with watch.on(unet):
        for watch.given, x, sigma in points:
            denoise(x, sigma)
    return watch.audit("U-Net", len(points))
