"""Networks with channels last in memory: nothing puts them first on the way, and nothing but rounding changes.

On a CPU; the group norm that keeps them last stands in for the one of a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sdxl_kernels import cuda_norm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder
from tests.model.peers import BASE, REFINER, randomize, stepped

LAST = torch.channels_last


@dataclass
class Standing:
    """What :class:`cuda_norm.FusedNorm` does, by torch."""

    uses: int = 0

    def width(self, *_: object) -> int:
        return 1

    def __call__(
        self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, width: int, silu: bool
    ) -> Tensor:
        self.uses += 1
        with _disable_current_modes():  # behind the back of whoever counts copies
            made = F.group_norm(x.contiguous(), groups, weight, bias, eps)
            return (F.silu(made) if silu else made).contiguous(memory_format=LAST)


@pytest.fixture
def norm(monkeypatch: pytest.MonkeyPatch) -> Standing:
    found = Standing()
    monkeypatch.setattr(cuda_norm, "ready", lambda device, dtype: found)
    monkeypatch.setattr(cuda_norm, "WANTED", (torch.float32,))
    return found


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Copies(TorchDispatchMode):
    """Counts what moves whole images in memory and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("contiguous", "clone", "copy_", "_to_copy", "repeat") and made.dim() == 4:
            source = args[1] if name == "copy_" else args[0]
            self.seen[name] += made.data_ptr() != source.data_ptr()
        return made


@contextmanager
def watched(network: nn.Module) -> Iterator[list[str]]:
    """Modules that gave an image with channels elsewhere than last."""
    wrong: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if (
                isinstance(output, Tensor)
                and output.dim() == 4
                and not output.is_contiguous(memory_format=LAST)
            ):
                wrong.append(f"{name}: {tuple(output.shape)} {output.stride()}")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    try:
        yield wrong
    finally:
        for handle in handles:
            handle.remove()


def conditions(unet: UNet) -> tuple[Tensor, Tensor]:
    text = torch.randn(2, 7, unet.config.context_dim)
    text[0] = 0.0
    return text, torch.randn(2, unet.config.adm_in_channels)


@pytest.mark.parametrize("config", [BASE.unet, REFINER.unet], ids=["base", "refiner"])
@pytest.mark.parametrize("size", [(16, 24), (19, 21)])
def test_the_unet(norm: Standing, config: Any, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    unet = UNet(config).eval()
    randomize(unet)
    x, t = torch.randn(1, 4, *size), torch.tensor([700, 700])
    prepared = unet.prepare(*conditions(unet))
    expected, norm.uses = stepped(unet, x, t, prepared), 0
    unet.lay_channels_last()
    with watched(unet) as wrong:
        made = stepped(unet, x, t, prepared)
    assert not wrong
    assert norm.uses == sum(isinstance(module, nn.GroupNorm) for module in unet.modules())
    assert made.is_contiguous()
    assert float((made - expected).norm() / expected.norm()) < 1e-5


def test_whatever_puts_channels_first_would_be_noticed(norm: Standing) -> None:
    unet = UNet(BASE.unet)
    unet.lay_channels_last()
    prepared = unet.prepare(*conditions(unet))
    unet.input_blocks[4].get_submodule("0").register_forward_hook(
        lambda module, inputs, output: output.contiguous()
    )
    with watched(unet) as wrong:
        stepped(unet, torch.randn(1, 4, 16, 24), torch.tensor([700, 700]), prepared)
    assert wrong


def test_tokens_are_the_memory_of_pixels(norm: Standing) -> None:
    """What is copied is the latent on its way in, the prediction on its way out, and doubled images."""
    unet = UNet(BASE.unet)
    prepared = unet.prepare(*conditions(unet))
    unet.lay_channels_last()
    x, t = torch.randn(1, 4, 16, 24), torch.tensor([700, 700])
    shifts = unet.shifts(t[None], prepared)[0]
    unet.step(x, shifts, prepared)
    with Copies() as copies:
        unet.step(x, shifts, prepared)
    doublings = 2 * 4
    assert copies.seen == {"contiguous": 2, "copy_": doublings}


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_the_autoencoder(norm: Standing, way: str) -> None:
    torch.manual_seed(0)
    vae = Autoencoder(BASE.vae).eval()
    randomize(vae, stream=1.0)
    given = torch.randn(1, 3, 48, 64) if way == "encode" else torch.randn(2, 4, 6, 8)

    def work() -> Tensor:
        return vae.encode(given).mean if way == "encode" else vae.decode(given)

    expected, norm.uses = work(), 0
    vae.lay_channels_last()
    with watched(vae) as wrong:
        made = work()
    assert not wrong
    half = vae.encoder if way == "encode" else vae.decoder
    assert norm.uses == sum(isinstance(module, nn.GroupNorm) for module in half.modules())
    assert made.stride() == expected.stride()
    assert float((made - expected).norm() / expected.norm()) < 1e-5


def test_training_is_left_alone(norm: Standing) -> None:
    with torch.inference_mode(False):
        unet = UNet(BASE.unet)
        unet.lay_channels_last()
        text, vector = (value.clone() for value in conditions(unet))
        unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), text, vector).sum().backward()
    assert not norm.uses
    assert all(p.grad is not None for p in unet.parameters())


def test_weights_change_in_place(norm: Standing) -> None:
    """As when a LoRA is merged into a model that is loaded."""
    unet = UNet(BASE.unet)
    randomize(unet)
    unet.lay_channels_last()
    x, t = torch.randn(1, 4, 16, 24), torch.tensor([700, 700])
    for parameter in unet.parameters():
        parameter += 0.01 * torch.randn(parameter.shape)
    fresh = UNet(BASE.unet)
    fresh.load_state_dict({name: value.contiguous() for name, value in unet.state_dict().items()})
    told = conditions(unet)
    made, expected = (stepped(net, x, t, net.prepare(*told)) for net in (unet, fresh))
    assert float((made - expected).norm() / expected.norm()) < 1e-4
