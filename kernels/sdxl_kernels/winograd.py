"""3x3 and 2x2 convolutions with fewer multiplications: Winograd's minimal filtering (arXiv 1509.09308)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

POINTS = (0, 1, -1, 2, -2)
"""Where polynomials are evaluated, beside infinity. Small numbers keep rounding errors small."""
ONE = POINTS.index(1)
"""Every power of 1 is 1: what is added at this place, down and across, is added to every output of a tile."""
TILES = {torch.float32: 4, torch.float64: 4, torch.bfloat16: 2}
"""Outputs a side. With 4 numbers of 8 bits lose too much: 2e-2 of the result, where 2 lose 4e-3."""


@cache
def toom_cook(outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of F(outputs, taps): ``A.T [(G g) * (B.T d)]`` is the filter g slid over d.

    Transposed multiplication of polynomials: evaluate both at n - 1 points and at infinity, multiply there,
    interpolate (arXiv 1509.09308, section 4).

    Args:
        outputs: how many outputs at once.
        taps: length of the filter.

    Returns:
        A transposed [outputs, n], G [n, taps] and B transposed [n, n], float64, with n = outputs + taps - 1.
    """
    n = outputs + taps - 1
    points = [float(point) for point in POINTS[: n - 1]]
    a, g, b = torch.zeros(3, n, n, dtype=torch.float64, device="cpu").unbind()
    for row, point in enumerate(points):
        others = [other for other in points if other != point]
        powers = torch.tensor([point**power for power in range(n)], dtype=torch.float64, device="cpu")
        a[row], g[row] = powers, powers
        for other in others:
            g[row] /= point - other
        b[row, : n - 1] = _polynomial(others)
    a[n - 1, outputs - 1] = g[n - 1, taps - 1] = 1.0
    b[n - 1] = _polynomial(points)
    return a[:, :outputs].T.contiguous(), g[:, :taps].contiguous(), b.contiguous()


def _polynomial(roots: list[float]) -> Tensor:
    """Coefficients of the product of (x - root), the constant first."""
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    found = zero + 1.0
    for root in roots:
        found = torch.cat([zero, found]) - root * torch.cat([found, zero])
    return found


class Winograd:
    """A convolution in tiles of outputs, its kernel transformed once.

    F(4, 3) multiplies 36 times for 16 outputs instead of 144 times. The transformed kernel is four times as large,
    so it is not kept: making it costs as much as a few dozen pixels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, tile: int) -> None:
        """Transform a kernel.

        Args:
            weight: [D, C, k, k].
            bias: [D], or none.
            tile: outputs a side of what is computed at once.
        """
        taps = weight.shape[-1]
        self.tile, self.size, self.bias = tile, tile + taps - 1, bias
        outputs, inputs = weight.shape[:2]
        back, kernel, into = (torch.kron(matrix, matrix).to(weight) for matrix in toom_cook(tile, taps))
        self.into, self.back = into, back
        if weight.is_contiguous():
            self.kernel = (kernel @ weight.view(outputs * inputs, -1).T).view(-1, outputs, inputs).mT
        else:
            rows = weight.permute(0, 2, 3, 1).reshape(outputs, taps * taps, inputs)
            self.kernel = (kernel @ rows).permute(1, 2, 0)

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve what is padded already.

        Args:
            x: [B, h + k - 1, w + k - 1, C] contiguous, h and w multiples of the tile.

        Returns:
            [B, h / tile, tile, w / tile, tile, D], a view of something laid out otherwise.
        """
        batch, height, width, channels = x.shape
        m, n = self.tile, self.size
        down, across = (height - n + m) // m, (width - n + m) // m
        tiles = x.as_strided(
            (n, n, batch, down, across, channels),
            (width * channels, channels, height * width * channels, m * width * channels, m * channels, 1),
        )
        moved = self.into @ tiles.reshape(n * n, -1)
        product = torch.bmm(moved.view(n * n, -1, channels), self.kernel)
        if self.bias is not None:
            product[n * ONE + ONE].add_(self.bias)
        out = self.back @ product.view(n * n, -1)
        return out.view(m, m, batch, down, across, -1).permute(2, 3, 0, 4, 1, 5)
