"""The Inception network whose features FID, KID and the Inception score are defined on.

It is the TensorFlow network of 2015-12-05, with 1008 classes and pooling that leaves padding out of its means; the
files that pytorch-fid and torch-fidelity publish are its weights. torchvision's own Inception is another network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import inception as blocks

from sdxl_cli.errors import FileError
from sdxl_cli.metrics.weights import find_weights, open_weights

Resize = Literal["tf1", "clean"]
RESIZES: tuple[Resize, ...] = get_args(Resize)
"""How pictures become 299x299: ``tf1`` as TensorFlow 1, in which FID was first computed, does: bilinear without
antialiasing, like torch-fidelity and torchmetrics (pytorch-fid is half a pixel beside it); ``clean`` with Pillow's
bicubic filter, antialiased, like clean-fid (Parmar et al. 2022)."""
SIDE, FEATURES, CLASSES = 299, 2048, 1008
FLAG = "--inception-weights"

_COUNTER = "num_batches_tracked"
_LAYERS = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
    "Mixed_7a", "Mixed_7b", "Mixed_7c",
)  # fmt: skip


class Inception(nn.Module):
    """Pictures to features and logits; frozen."""

    def __init__(self) -> None:
        """Weights are random until loaded, see :func:`load_inception`."""
        super().__init__()
        self.net = blocks.Inception3(
            num_classes=CLASSES,
            aux_logits=False,
            init_weights=False,
            inception_blocks=[
                blocks.BasicConv2d, _A, blocks.InceptionB, _C, blocks.InceptionD, _E, blocks.InceptionAux
            ],
        )  # fmt: skip
        # the last block alone pools with a maximum; a slip of the authors', which the numbers of all the field have
        self.net.Mixed_7c.largest = True
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 2048] and logits without bias [B, 1008] of pictures [B, 3, 299, 299] in 0 … 255, float32."""
        x = (images - 128) / 128
        for name in _LAYERS:
            x = getattr(self.net, name)(x)
        features = x.mean(dim=(2, 3))
        return features, features @ self.net.fc.weight.T


def find_inception(given: Path | None) -> Path:
    """The file of weights: ``given``, else the published one from torch's cache.

    Raises:
        NetworkError: it is not there.
        FileError: another file has its name.
    """
    return given.expanduser() if given is not None else find_weights("inception", FLAG)


def load_inception(path: Path) -> Inception:
    """The network with the weights of a file, on the CPU.

    Raises:
        FileError: missing, damaged, or another network.
    """
    (tensors,) = open_weights([path])
    model = Inception()
    state = {}
    for name, expected in model.net.state_dict().items():
        if name.endswith(_COUNTER):
            state[name] = expected
        elif tensors.shapes.get(name) != tuple(expected.shape):
            raise FileError(
                f"{path} is not the Inception network of FID: {name} is {_found(tensors.shapes.get(name))}"
            )
        else:
            state[name] = tensors.read(name).float()
    model.net.load_state_dict(state)
    return model


def _found(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "missing"
    other = "; it is torchvision's, trained apart" if shape[:1] == (1000,) else ""
    return f"of shape {list(shape)}{other}"


def resized(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], how: Resize) -> Tensor:
    """A picture [H, W, 3], uint8, of any size as the network takes it: float32 [3, 299, 299] in 0 … 255."""
    if how == "tf1":
        image = torch.from_numpy(pixels).permute(2, 0, 1).float()
        return _tf1(_tf1(image, 1), 2)
    # colour by colour in floating point: Pillow would round colour pictures to whole levels
    planes = [Image.fromarray(pixels[:, :, colour].astype(np.float32)) for colour in range(3)]
    resized = [np.asarray(plane.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255)


def _tf1(image: Tensor, dim: int) -> Tensor:
    """Bilinear along one side as TensorFlow 1 does it: pixel ``i`` is taken at ``i * from / to``, its left edge."""
    size = image.shape[dim]
    places = torch.arange(SIDE, dtype=torch.float32) * (size / SIDE)
    left = places.floor().long().clamp_max(size - 1)
    right = (left + 1).clamp_max(size - 1)
    shape = [1, 1, 1]
    shape[dim] = SIDE
    low, high = image.index_select(dim, left), image.index_select(dim, right)
    return low + (high - low) * (places - left).view(shape)


class _A(blocks.InceptionA):  # type: ignore[misc]
    """torchvision's block with means that leave padding out, as TensorFlow's do; likewise the next."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pool = self.branch_pool(_mean(x))
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, pool]


class _C(blocks.InceptionC):  # type: ignore[misc]
    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = x
        for number in range(1, 6):
            double = getattr(self, f"branch7x7dbl_{number}")(double)
        return [self.branch1x1(x), single, double, self.branch_pool(_mean(x))]


class _E(blocks.InceptionE):  # type: ignore[misc]
    largest = False
    """Whether it pools with a maximum."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.largest else _mean(x)
        return [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
