"""Fused layers against the formulas they stand for, written out."""

from __future__ import annotations

import math

import pytest
import torch
from sdxl_kernels import convolution
from sdxl_kernels.convolution import (
    downsample_conv,
    downsample_conv_asymmetric,
    subpixel_weight,
    upsample_conv,
    upsample_conv_subpixel,
)
from sdxl_kernels.feedforward import geglu
from sdxl_kernels.normalization import group_norm, group_norm_silu
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

F64 = torch.float64


def randn(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def normal_cdf(x: Tensor) -> Tensor:
    """By quadrature of the density, so that no error function is taken for granted."""
    steps = torch.linspace(0, 1, 2001, dtype=F64)
    grid = x[..., None] * steps
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    return 0.5 + torch.trapezoid(density, grid, dim=-1)


def test_geglu_is_value_times_gate_times_its_normal_probability() -> None:
    x, weight, bias = randn(2, 3, 4), randn(10, 4), randn(10)
    both = x @ weight.T + bias
    value, gate = both[..., :5], both[..., 5:]
    assert torch.allclose(geglu(x, weight, bias), value * gate * normal_cdf(gate), atol=1e-5)


def naive_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for image in range(len(x)):
        for group in range(groups):
            channels = slice(group * size, (group + 1) * size)
            part = x[image, channels]
            mean = part.mean()
            variance = ((part - mean) ** 2).mean()
            out[image, channels] = (part - mean) / torch.sqrt(variance + eps)
    return out * weight[None, :, None, None] + bias[None, :, None, None]


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_group_norm_is_its_formula(eps: float, scale: float) -> None:
    x, weight, bias = scale * randn(2, 12, 3, 5) + scale, randn(12), randn(12)
    expected = naive_group_norm(x, 4, weight, bias, eps)
    assert torch.allclose(group_norm(x, 4, weight, bias, eps), expected)
    silu = expected / (1 + torch.exp(-expected))
    assert torch.allclose(group_norm_silu(x, 4, weight, bias, eps), silu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_in_single_precision(dtype: torch.dtype) -> None:
    """The sum of squares of these would be infinite in half precision, and useless in bfloat16."""
    x = (300 + 20 * randn(1, 4, 64, 64)).to(dtype)
    weight, bias = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    expected = naive_group_norm(x.double(), 2, weight.double(), bias.double(), 1e-5)
    error = (group_norm(x, 2, weight, bias, 1e-5).double() - expected).abs().max()
    assert error < 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_inputs_are_not_written_to() -> None:
    x, weight, bias = randn(2, 4, 3, 3), randn(4), randn(4)
    kept = x.clone()
    with torch.no_grad():
        group_norm_silu(x, 2, weight, bias, 1e-5)
        group_norm(x, 2, weight, bias, 1e-5)
    assert torch.equal(x, kept)


def naive_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """3x3, without padding, by its definition."""
    height, width = ((n - 3) // stride + 1 for n in x.shape[2:])
    out = torch.empty(len(x), len(weight), height, width, dtype=x.dtype)
    for row in range(height):
        for column in range(width):
            window = x[:, :, row * stride : row * stride + 3, column * stride : column * stride + 3]
            out[:, :, row, column] = torch.einsum("bcij,dcij->bd", window, weight) + bias
    return out


def framed(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """With zeros around it."""
    batch, channels, height, width = x.shape
    out = torch.zeros(batch, channels, height + top + bottom, width + left + right, dtype=x.dtype)
    out[:, :, top : top + height, left : left + width] = x
    return out


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 2)])
def test_the_unets_downsampling_pads_all_sides(size: tuple[int, int]) -> None:
    x, weight, bias = randn(2, 3, *size), randn(4, 3, 3, 3), randn(4)
    out = downsample_conv(x, weight, bias)
    assert out.shape[2:] == tuple(-(-n // 2) for n in size)
    assert torch.allclose(out, naive_conv(framed(x, 1, 1, 1, 1), weight, bias, 2))


@pytest.mark.parametrize("size", [(6, 8), (2, 4)])
def test_the_vaes_downsampling_pads_right_and_below(size: tuple[int, int]) -> None:
    x, weight, bias = randn(2, 3, *size), randn(4, 3, 3, 3), randn(4)
    out = downsample_conv_asymmetric(x, weight, bias)
    assert out.shape[2:] == (size[0] // 2, size[1] // 2)
    assert torch.allclose(out, naive_conv(framed(x, 0, 1, 0, 1), weight, bias, 2))


@pytest.mark.parametrize("target", [None, (6, 10), (5, 9), (5, 10)])
def test_upsampling_repeats_every_pixel(target: tuple[int, int] | None) -> None:
    """Twice, but for the last row or column of a size that was odd before it was halved."""
    x, weight, bias = randn(2, 3, 3, 5), randn(4, 3, 3, 3), randn(4)
    height, width = target or (6, 10)
    rows = [row * 3 // height for row in range(height)]
    columns = [column * 5 // width for column in range(width)]
    repeated = x[:, :, rows][:, :, :, columns]
    expected = naive_conv(framed(repeated, 1, 1, 1, 1), weight, bias, 1)
    assert torch.allclose(upsample_conv(x, weight, bias, target), expected)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [randn(*shape).requires_grad_() for shape in shapes]


CHECKS = {
    "geglu": (geglu, [(2, 3), (4, 3), (4,)]),
    "group_norm": (lambda x, w, b: group_norm(x, 2, w, b, 1e-5), [(1, 4, 2, 2), (4,), (4,)]),
    "group_norm_silu": (lambda x, w, b: group_norm_silu(x, 2, w, b, 1e-5), [(1, 4, 2, 2), (4,), (4,)]),
    "upsample_conv": (upsample_conv, [(1, 2, 2, 2), (2, 2, 3, 3), (2,)]),
    "upsample_conv_subpixel": (upsample_conv_subpixel, [(1, 2, 2, 2), (2, 2, 3, 3), (2,)]),
    "downsample_conv": (downsample_conv, [(1, 2, 3, 4), (2, 2, 3, 3), (2,)]),
    "downsample_conv_asymmetric": (downsample_conv_asymmetric, [(1, 2, 4, 4), (2, 2, 3, 3), (2,)]),
}


@pytest.mark.parametrize("name", CHECKS)
def test_gradients(name: str) -> None:
    function, shapes = CHECKS[name]
    assert torch.autograd.gradcheck(function, leaves(*shapes))


@pytest.mark.parametrize("trainable", ["x", "weight", "bias"])
def test_gradients_when_only_a_part_is_trained(trainable: str) -> None:
    """SiLU works in place only where nothing needs what it overwrites."""
    torch.manual_seed(0)
    tensors = {"x": randn(1, 4, 3, 3), "weight": randn(4), "bias": randn(4)}
    tensors[trainable].requires_grad_()
    group_norm_silu(tensors["x"], 2, tensors["weight"], tensors["bias"], 1e-5).sum().backward()
    x, weight, bias = (tensor.detach().clone() for tensor in tensors.values())
    clone = {"x": x, "weight": weight, "bias": bias}
    clone[trainable].requires_grad_()
    normed = naive_group_norm(x, 2, weight, bias, 1e-5)
    (normed * torch.sigmoid(normed)).sum().backward()
    ours, theirs = tensors[trainable].grad, clone[trainable].grad
    assert ours is not None
    assert theirs is not None
    assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_subpixel_doubling_is_doubling_then_a_convolution(
    size: tuple[int, int], layout: torch.memory_format
) -> None:
    x, weight, bias = randn(2, 3, *size).contiguous(memory_format=layout), randn(5, 3, 3, 3), randn(5)
    doubled = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    expected = torch.nn.functional.conv2d(doubled, weight, bias, padding=1)
    made = upsample_conv_subpixel(x, weight, bias)
    assert torch.allclose(made, expected, atol=1e-12)
    assert size == (1, 1) or made.is_contiguous(memory_format=layout)


def test_kernels_of_four_pixels_keep_their_channels_where_they_are() -> None:
    """Otherwise they would be moved before every convolution."""
    weight = randn(6, 4, 3, 3)
    first, last = weight, weight.contiguous(memory_format=torch.channels_last)
    made = subpixel_weight(last)
    assert torch.equal(made, subpixel_weight(first))
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert subpixel_weight(first).is_contiguous()


@pytest.mark.parametrize("size", [None, (7, 10)])
def test_every_doubling_is_done_so_on_every_device(
    size: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for sizes that were odd before they were halved; while training too."""
    asked: list[int] = []
    real = convolution.upsample_conv_subpixel
    monkeypatch.setattr(convolution, "upsample_conv_subpixel", lambda *given: asked.append(1) or real(*given))
    x, weight, bias = leaves((1, 3, 4, 5), (2, 3, 3, 3), (2,))
    upsample_conv(x, weight, bias, size).sum().backward()
    assert bool(asked) is (size is None)
    assert x.grad is not None


def test_subpixel_doubling_does_four_ninths_of_the_work() -> None:
    x, weight = randn(1, 8, 63, 63), randn(8, 8, 3, 3)
    with FlopCounterMode(display=False) as counter:
        upsample_conv_subpixel(x, weight, None)
    assert counter.get_total_flops() == 2 * 8 * 8 * 4 * 4 * 64 * 64  # one row and column more than there are
