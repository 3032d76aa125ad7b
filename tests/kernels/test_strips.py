"""Strips and Winograd's convolutions against the plain ones."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from sdxl_kernels import strips
from sdxl_kernels.convolution import downsample_conv_asymmetric
from sdxl_kernels.winograd import TILES, Winograd, toom_cook
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

F64 = torch.float64
SIZES = [(1, 37, 29, 32, 64), (2, 16, 16, 32, 32), (1, 21, 16, 40, 33), (2, 5, 3, 8, 4), (1, 1, 2, 4, 4)]


@pytest.fixture(params=[(1, 1), (600, 1), (1 << 22, 1), (600, 5 << 20)], ids=str)
def _strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, transformed = request.param
    monkeypatch.setattr(strips, "STRIP", plain)
    monkeypatch.setattr(strips, "TRANSFORMED", transformed)
    monkeypatch.setattr(strips, "FEWEST_TILES", 1)
    monkeypatch.setattr(strips, "FEWEST_PIXELS", 1)


def problem(size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, strips.Norm]:
    torch.manual_seed(0)
    batch, height, width, channels, outputs = size
    x = 3 * torch.randn(batch, height, width, channels, dtype=F64) + 5
    norm = strips.Norm(4, torch.randn(channels, dtype=F64), torch.randn(channels, dtype=F64), 1e-6)
    return x, torch.randn(outputs, channels, 3, 3, dtype=F64), torch.randn(outputs, dtype=F64), norm


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_normalised_on_the_way(size: tuple[int, ...], winograd: bool) -> None:
    x, weight, bias, norm = problem(size)
    normed = F.silu(F.group_norm(nchw(x), norm.groups, norm.weight, norm.bias, norm.eps))
    expected = F.conv2d(normed, weight, bias, padding=1)
    made = strips.conv3x3(x, weight, bias, norm=norm, winograd=winograd)
    torch.testing.assert_close(nchw(made), expected, rtol=1e-10, atol=1e-10)
    before = torch.randn_like(made)
    onto = before.clone()
    assert strips.conv3x3(x, weight, bias, norm=norm, onto=onto, winograd=winograd) is onto
    torch.testing.assert_close(onto, made + before, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_doubled_without_making_the_double(size: tuple[int, ...], winograd: bool) -> None:
    x, weight, bias, _ = problem(size)
    expected = F.conv2d(F.interpolate(nchw(x), scale_factor=2.0), weight, bias, padding=1)
    made = strips.upsample_conv(x, weight, bias, winograd=winograd)
    torch.testing.assert_close(nchw(made), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("size", [(2, 16, 16, 8, 8), (1, 6, 14, 4, 12)], ids=str)
def test_halved(size: tuple[int, ...]) -> None:
    x, weight, bias, _ = problem(size)
    made = strips.downsample_conv(x, weight, bias)
    torch.testing.assert_close(nchw(made), downsample_conv_asymmetric(nchw(x), weight, bias))


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("outputs", [2, 6, 11])
def test_one_by_one_in_its_own_place(outputs: int) -> None:
    x, weight, bias = (
        torch.randn(1, 9, 7, 6, dtype=F64),
        torch.randn(outputs, 6, 1, 1, dtype=F64),
        torch.randn(outputs).double(),
    )
    expected = F.conv2d(nchw(x), weight, bias).permute(0, 2, 3, 1)
    address = x.data_ptr()
    made = strips.conv1x1(x, weight, bias)
    torch.testing.assert_close(made, expected)
    assert (made.data_ptr() == address) == (outputs <= 6)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_statistics_do_not_drown_in_a_large_mean(offset: float) -> None:
    """In single precision, the mean of squares less the square of the mean would have no digit left."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 64, 8) + offset * torch.randn(8)
    norm = strips.Norm(4, torch.randn(8), torch.randn(8), 1e-6)
    scale, shift = strips.channel_scale(x, norm)
    expected = F.group_norm(nchw(x).double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
    made = nchw(x.double() * scale.double() + shift.double())
    assert (made - expected).abs().max() < 1e-6 * max(1.0, offset)
    exact_scale, _ = strips.channel_scale(x.double(), norm)
    assert (scale / exact_scale - 1).abs().max() < 2e-6


@pytest.mark.parametrize(("outputs", "taps"), [(4, 3), (2, 3), (4, 2), (2, 2)])
def test_the_algorithm_is_exact_in_fractions(outputs: int, taps: int) -> None:
    """All entries are small fractions; with them, the product is the filter slid over the data, with no error."""
    a, g, b = (
        [[Fraction(value).limit_denominator(1000) for value in row] for row in matrix.tolist()]
        for matrix in toom_cook(outputs, taps)
    )
    kernel = [Fraction(3 * k + 1, 7) for k in range(taps)]
    data = [Fraction(k * k - 5, 3) for k in range(outputs + taps - 1)]

    def times(matrix: list[list[Fraction]], vector: list[Fraction]) -> list[Fraction]:
        return [sum((x * y for x, y in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]

    products = [x * y for x, y in zip(times(g, kernel), times(b, data), strict=True)]
    slid = [sum(data[i + k] * kernel[k] for k in range(taps)) for i in range(outputs)]
    assert times(a, products) == slid


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
def test_what_rounding_does(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 34, 34, 64), torch.randn(64, 64, 3, 3) / 24
    expected = F.conv2d(nchw(x).double(), weight.double()).permute(0, 2, 3, 1)
    made = Winograd(weight.to(dtype), None, TILES[dtype])(x.to(dtype)).reshape(expected.shape).double()
    error = (made - expected).norm() / expected.norm()
    assert error < bound


@pytest.mark.parametrize("last", [False, True])
def test_kernels_stored_channels_last_are_taken_as_they_are(last: bool) -> None:
    x, weight = torch.randn(1, 10, 14, 32, dtype=F64), torch.randn(8, 32, 3, 3, dtype=F64)
    layout = torch.channels_last if last else torch.contiguous_format
    made = Winograd(weight.contiguous(memory_format=layout), None, 4)(x)
    torch.testing.assert_close(made.reshape(1, 8, 12, 8), F.conv2d(nchw(x), weight).permute(0, 2, 3, 1))


def test_a_quarter_of_the_multiplications() -> None:
    """36 for 16 pixels instead of 144; what transforming costs is counted too."""
    x, weight, bias = torch.empty(1, 128, 128, 512), torch.empty(512, 512, 3, 3), torch.empty(512)
    counts = []
    for winograd in (False, True):
        with FlopCounterMode(display=False) as seen:
            strips.conv3x3(x.to("meta"), weight.to("meta"), bias.to("meta"), winograd=winograd)
        counts.append(seen.get_total_flops())
    assert counts[0] == 2 * 9 * 512 * 512 * 128 * 128
    assert counts[1] < 0.4 * counts[0]


def test_not_where_it_does_not_pay() -> None:
    x = torch.empty(1, 64, 64, 64)
    assert strips.pays(x, torch.empty(64, 64, 3, 3)) == 4
    assert strips.pays(x.bfloat16(), torch.empty(64, 64, 3, 3)) == 2
    assert strips.pays(x.half(), torch.empty(64, 64, 3, 3)) is None
    assert strips.pays(x, torch.empty(3, 64, 3, 3)) is None
    assert strips.pays(torch.empty(1, 8, 8, 64), torch.empty(64, 64, 3, 3)) is None
    wide = torch.empty(2, 32, 32, 1280, device="meta")
    assert strips.pays(wide, torch.empty(1280, 1280, 3, 3, device="meta")) == 4
    assert strips.pays(wide, torch.empty(4 * 1280, 1280, 2, 2, device="meta")) is None, "655 MB of it"
