"""LPIPS, the learned perceptual distance (Zhang et al. 2018, version 0.1), on VGG16 or AlexNet.

Its two parts are published apart: a trunk trained on ImageNet, whose features are compared, and "heads" that weigh
the differences channel by channel, which the authors fitted to what people judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sdxl_cli.checkpoint.tensor_file import Tensors
from sdxl_cli.errors import FileError
from sdxl_cli.metrics.weights import find_weights, open_weights

Net = Literal["vgg", "alex"]
NETS: tuple[Net, ...] = get_args(Net)
FLAG = "--lpips-weights"
"""What gives its files on the command line."""

_TRUNKS: dict[Net, str] = {"vgg": "vgg16", "alex": "alexnet"}
_TAPS: dict[Net, tuple[int, ...]] = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
"""Layers of the trunk whose outputs are compared: the last ReLU of each of VGG's blocks, every one of AlexNet's."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation, for pictures in -1 … 1."""
_EPS = 1e-10
_LEAST = {"vgg": 16, "alex": 63}
"""Sides in pixels below which the trunk has nothing left."""


class LPIPS(nn.Module):
    """The distance of pairs of pictures; frozen, the same in training and evaluation, and differentiable."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Net = "vgg") -> None:
        """``net`` is the trunk. Weights are random until loaded, see :func:`load_lpips`."""
        super().__init__()
        self.net: Net = net
        self.trunk = nn.Sequential(*(_vgg16() if net == "vgg" else _alexnet()))
        self.heads = nn.ParameterList(torch.rand(width) for width in self._widths())
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distances [B] of pictures [B, 3, H, W] in -1 … 1: 0 is the same.

        Raises:
            ValueError: a side is too small for the trunk.
        """
        if min(images.shape[-2:]) < self.least_side:
            raise ValueError(f"LPIPS ({self.net}) needs sides of {self.least_side} pixels")
        distances = [
            torch.einsum("bchw,c->b", (_unit(a) - _unit(b)).square(), head) / (a.shape[2] * a.shape[3])
            for a, b, head in zip(self._features(images), self._features(others), self.heads, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)

    @property
    def least_side(self) -> int:
        """In pixels: what the trunk makes features of."""
        return _LEAST[self.net]

    def digest(self) -> str:
        """sha256 of all weights: which LPIPS it is, whatever files it came from."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        x = (images - self.shift) / self.scale
        for index, layer in enumerate(self.trunk):
            x = layer(x)
            if index in _TAPS[self.net]:
                yield x

    def _widths(self) -> Iterator[int]:
        for tap in _TAPS[self.net]:
            layer = self.trunk[tap - 1]
            assert isinstance(layer, nn.Conv2d)
            yield layer.out_channels


def load_lpips(net: Net = "vgg", files: Sequence[Path] = ()) -> LPIPS:
    """LPIPS with its published weights, on the CPU.

    Args:
        net: the trunk.
        files: where to read weights from; what they lack is looked for in the local caches. Trunks as torchvision
            names them, heads as the ``lpips`` package does, or both in one file as that package saves itself.

    Raises:
        FileError: a file is missing, damaged, or has neither trunk nor heads of this ``net``.
        NetworkError: something is in no file and in no cache.
    """
    given = open_weights(files)
    for path, tensors in zip(files, given, strict=True):
        if not any(_ours(name) for name in tensors.shapes):
            raise FileError(f"{path} has no weights of LPIPS ({net}) or of its trunk")
    state: dict[str, Tensor] = {}
    for part, known in (("trunk.", _TRUNKS[net]), ("heads.", f"lpips-{net}")):
        found = {name: tensor for tensors in given for name, tensor in _part(tensors, part).items()}
        if not found:
            (cached,) = open_weights([find_weights(known, FLAG)])
            found = _part(cached, part)
        state |= found
    model = LPIPS(net)
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state or state[name].numel() != tensor.numel():
            raise FileError(
                f"{', '.join(map(str, files))}: {name} of LPIPS ({net}) is missing or of another shape"
            )
    model.load_state_dict({name: state[name].float().view_as(tensor) for name, tensor in expected.items()})
    return model


def _part(tensors: Tensors, part: str) -> dict[str, Tensor]:
    """The trunk's or the heads' tensors of a file, under the names they have here."""
    named = ((_ours(name), name) for name in tensors.shapes)
    return {ours: tensors.read(name) for ours, name in named if ours and ours.startswith(part)}


def _ours(name: str) -> str | None:
    """What a tensor of others is called here: ``features.0.bias`` (torchvision), ``net.slice1.0.bias`` and
    ``lin0.model.1.weight`` (lpips); None for what is not needed.
    """
    parts = name.split(".")
    match parts:
        case ["features", layer, kind]:
            return f"trunk.{layer}.{kind}"
        case ["net", group, layer, kind] if group.startswith("slice"):
            return f"trunk.{layer}.{kind}"
        case [head, "model", _, "weight"] if head.startswith("lin"):
            return f"heads.{head.removeprefix('lin')}"
    return None


def _unit(features: Tensor) -> Tensor:
    """Every position's channels as a vector of length one."""
    # the smallest number keeps the slope of the root finite where a ReLU left nothing
    squares = features.square().sum(dim=1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)
    return features / (squares.sqrt() + _EPS)


def _vgg16() -> Iterator[nn.Module]:
    """The convolutions of VGG16 (configuration D) as torchvision counts them, without the last pooling."""
    width = 3
    for block, (channels, layers) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if block:
            yield nn.MaxPool2d(2)
        for _ in range(layers):
            yield nn.Conv2d(width, channels, 3, padding=1)
            yield nn.ReLU()
            width = channels


def _alexnet() -> Iterator[nn.Module]:
    """The convolutions of AlexNet as torchvision counts them, without the last pooling."""
    yield from (nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2))
    yield from (nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2))
    yield from (nn.Conv2d(192, 384, 3, padding=1), nn.ReLU())
    yield from (nn.Conv2d(384, 256, 3, padding=1), nn.ReLU())
    yield from (nn.Conv2d(256, 256, 3, padding=1), nn.ReLU())
