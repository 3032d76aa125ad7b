"""Convolutions strip by strip, normalising on the way: nothing of full size is made but the result.

All tensors are channels last, [B, H, W, C] contiguous. A strip is a few rows, with one more above and below, which
is all that a 3x3 kernel sees: there are no seams. The group norm in front has statistics of the whole image, found
beforehand. For inference only: what is computed is written over what is no longer needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdxl_kernels.convolution import subpixel_weight
from sdxl_kernels.winograd import TILES, Winograd

STRIP = 1 << 22
"""Numbers in a strip of a direct convolution; 16 MiB of fp32."""
TRANSFORMED = 5 << 20
"""Numbers in a transformed strip: enough tiles for matrix products to be fast, few enough to stay in a cache."""
FEWEST_TILES = 128
NARROW = 32
"""With fewer channels than this, transforming costs more than multiplying."""
FEWEST_PIXELS = 256
"""For fewer pixels than this, transforming the kernel costs more than is won."""
LARGEST_KERNEL = 512 << 20
"""Bytes of a transformed kernel beyond which making it costs more than is won: its memory is not used again."""
STATISTICS = 1 << 17
"""Numbers summed in single precision; their sums are summed in double precision."""

Fill = Callable[[Tensor, Tensor], None]
"""Writes what is made of some rows [B, h, W, C] into a place of the same shape."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A group norm followed by SiLU."""

    groups: int
    weight: Tensor
    """[C]."""
    bias: Tensor
    """[C]."""
    eps: float


def channel_scale(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """What to multiply each channel by and what to add then, for it to be normalised.

    The sums are of differences to a first guess of the mean, so that none is lost where the mean is large.

    Args:
        x: [B, H, W, C].
        norm: how.

    Returns:
        Two tensors [B, 1, 1, C], fp32 or x's own dtype if that is finer.
    """
    batch, channels = len(x), x.shape[-1]
    fine = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(batch, -1, channels)
    many = max(1, STATISTICS // channels)
    guess = rows[:, :many].to(fine).mean(dim=1, keepdim=True)
    sums = torch.zeros(2, batch, channels, dtype=torch.float64, device=x.device)
    for start in range(0, rows.shape[1], many):
        part = rows[:, start : start + many] - guess
        sums[0] += part.sum(dim=1)
        sums[1] += part.square_().sum(dim=1)
    mean, square = sums.view(2, batch, norm.groups, -1) / rows.shape[1]
    shift = guess.double().view(batch, norm.groups, -1)
    group_mean = (mean + shift).mean(dim=-1, keepdim=True)
    # each channel's second moment about the group's mean: E(d²) + 2 E(d) e + e², d from the guess, e guess to mean
    apart = shift - group_mean
    variance = (square + 2 * mean * apart + apart.square()).mean(dim=-1, keepdim=True)
    scale = (variance + norm.eps).rsqrt() * norm.weight.double().view(norm.groups, -1)
    offset = norm.bias.double().view(norm.groups, -1) - group_mean * scale
    return scale.view(batch, 1, 1, -1).to(fine), offset.view(batch, 1, 1, -1).to(fine)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: Norm | None = None,
    onto: Tensor | None = None,
    winograd: bool = False,
) -> Tensor:
    """A 3x3 convolution with padding 1, of ``silu(group_norm(x))`` if there is a norm.

    Args:
        x: [B, H, W, C].
        weight: [D, C, 3, 3].
        bias: [D].
        norm: what comes in front.
        onto: [B, H, W, D], which the result is added to, in place.
        winograd: whether Winograd's algorithm may be used, where it pays.

    Returns:
        [B, H, W, D]; ``onto`` if there is one.
    """
    batch, height, width, _ = x.shape
    out = x.new_empty(batch, height, width, len(weight)) if onto is None else onto
    fast = pays(x, weight) if winograd else None
    step = fast or 1
    across = -(-width // step) * step
    rows = min(_rows(batch, across, max(weight.shape[:2]), fast), -(-height // step) * step)
    conv = Winograd(weight, bias, fast) if fast else _direct(weight, bias)
    for start, count, strip in _strips(x, rows, across, _fill(x, norm)):
        made = conv(strip[:, : -(-count // step) * step + 2].contiguous() if fast else strip[:, : count + 2])
        place = out[:, start : start + count]
        if made.dim() == 6 and made.shape[1] * step == count and across == width:
            place = place.view(made.shape)
        else:
            made = made.reshape(batch, -1, across, len(weight))[:, :count, :width]
        place.add_(made) if onto is not None else place.copy_(made)
    return out


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor, *, winograd: bool = False) -> Tensor:
    """Nearest-neighbour doubling, then a 3x3 convolution with padding 1; the doubled image is never made.

    Each of the four pixels that come from one is a 2x2 convolution; see
    :func:`sdxl_kernels.convolution.upsample_conv_subpixel`.

    Args:
        x: [B, H, W, C].
        weight: [D, C, 3, 3].
        bias: [D].
        winograd: as for :func:`conv3x3`.

    Returns:
        [B, 2·H, 2·W, D].
    """
    batch, height, width, _ = x.shape
    four, channels = subpixel_weight(weight), len(weight)
    out = x.new_empty(batch, 2 * height, 2 * width, channels)
    fast = pays(x, four) if winograd else None
    step = fast or 1
    across = -(-(width + 1) // step) * step  # one column more than there are: the last one's right neighbours
    # likewise one row more, so that a strip is whole tiles
    most = -(-(height + 1) // step) * step - 1
    rows = min(max(3, _rows(batch, across, max(four.shape[:2]), fast) - 1), most)
    conv = Winograd(four, bias.repeat(4), fast) if fast else _direct(four, bias.repeat(4))
    for start, count, strip in _strips(x, rows, across - 1, _fill(x, None)):
        whole = -(-(count + 1) // step) * step
        made = conv(strip[:, : whole + 1].contiguous() if fast else strip[:, : count + 2])
        made = made.reshape(batch, -1, across, 4 * channels)
        for index, part in enumerate(torch.split(made, channels, dim=-1)):
            down, right = divmod(index, 2)
            place = out[:, 2 * start + down : 2 * (start + count) : 2, right::2]
            place.copy_(part[:, down : down + count, right : right + width])
    return out


def downsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution with stride 2, padded by one on the right and below only (the VAE's).

    Args:
        x: [B, H, W, C], H and W even.
        weight: [D, C, 3, 3].
        bias: [D].

    Returns:
        [B, H/2, W/2, D].
    """
    batch, height, width, channels = x.shape
    out = x.new_empty(batch, height // 2, width // 2, len(weight))
    rows = max(2, STRIP // (batch * width * channels) // 2 * 2)
    for start in range(0, height, rows):
        part = x[:, start : start + rows + 1]
        missing = min(rows, height - start) + 1 - part.shape[1]
        padded = F.pad(part, (0, 0, 0, 1, 0, missing)).permute(0, 3, 1, 2)
        made = F.conv2d(padded, weight, bias, stride=2).permute(0, 2, 3, 1)
        out[:, start // 2 : start // 2 + made.shape[1]] = made
    return out


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution that takes no memory: the result is written over ``x``, where it is not wider.

    Args:
        x: [1, H, W, C]; its values are lost.
        weight: [D, C, 1, 1].
        bias: [D].

    Returns:
        [1, H, W, D]; a wider one is a new tensor.
    """
    (batch, height, width, channels), outputs = x.shape, len(weight)
    assert batch == 1
    pixels, matrix = x.view(-1, channels), weight.view(outputs, channels)
    if outputs > channels:
        return F.linear(pixels, matrix, bias).view(1, height, width, outputs)
    # what is written at a pixel lies before what is yet to be read
    out = x.view(-1)[: len(pixels) * outputs].view(-1, outputs)
    many = max(1, STRIP // channels)
    for start in range(0, len(pixels), many):
        out[start : start + many] = F.linear(pixels[start : start + many], matrix, bias)
    return out.view(1, height, width, outputs)


def pays(x: Tensor, weight: Tensor) -> int | None:
    """The tile of a Winograd convolution where it is faster; None where it is not.

    Args:
        x: [B, H, W, C].
        weight: [D, C, k, k].
    """
    batch, height, width, channels = x.shape
    small = min(len(weight), channels) < NARROW or batch * height * width < FEWEST_PIXELS
    tile = None if small else TILES.get(x.dtype)
    if tile is None:
        return None
    transformed = (tile + weight.shape[-1] - 1) ** 2 * len(weight) * channels * x.itemsize
    return tile if transformed <= LARGEST_KERNEL else None


def _rows(batch: int, width: int, channels: int, tile: int | None) -> int:
    """How many rows a strip has: at least two, and whole tiles."""
    if tile is None:
        return max(2, STRIP // (batch * width * channels))
    tiles = max(FEWEST_TILES, TRANSFORMED // ((tile + 2) ** 2 * channels))
    return tile * max(1, tiles // (batch * (width // tile)))


def _direct(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    weight = weight.contiguous(memory_format=torch.channels_last)

    def conv(strip: Tensor) -> Tensor:
        return F.conv2d(strip.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)

    return conv


def _fill(x: Tensor, norm: Norm | None) -> Fill:
    if norm is None:
        return _copy
    scale, offset = channel_scale(x, norm)

    def normalized(rows: Tensor, place: Tensor) -> None:
        if place.dtype == scale.dtype:
            torch.addcmul(offset, rows, scale, out=place)
            F.silu(place, inplace=True)
        else:
            place.copy_(F.silu(torch.addcmul(offset, rows, scale), inplace=True))

    return normalized


def _copy(rows: Tensor, place: Tensor) -> None:
    place.copy_(rows)


def _strips(x: Tensor, rows: int, width: int, fill: Fill) -> Iterator[tuple[int, int, Tensor]]:
    """First row, number of rows, and the strip itself [B, rows + 2, width + 2, C], zeros where there is no image."""
    batch, height, columns, channels = x.shape
    strip = x.new_zeros(batch, rows + 2, width + 2, channels)
    done = 0
    for start in range(0, height, rows):
        if start:  # what lies on the border of two strips is normalised once
            strip[:, :2] = strip[:, rows : rows + 2].clone()
        until = min(start + rows + 1, height)
        fill(x[:, done:until], strip[:, done - start + 1 : until - start + 1, 1 : columns + 1])
        strip[:, until - start + 1 :] = 0
        done = until
        yield start, min(rows, height - start), strip
