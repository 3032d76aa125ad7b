"""Random numbers belong to a picture, not to its batch."""

from __future__ import annotations

import math

import pytest
import torch

from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.noise import BrownianTree, NoiseStreams
from sdxl_cli.diffusion.schedule import NoiseSchedule


def test_a_stream_is_torchs_generator_of_that_seed() -> None:
    streams = NoiseStreams([7, 8])
    first, second = streams.next((4, 5, 6)), streams.next((2, 3))
    for index, seed in enumerate((7, 8)):
        generator = torch.Generator("cpu").manual_seed(seed)
        assert torch.equal(first[index], torch.randn(4, 5, 6, generator=generator))
        assert torch.equal(second[index], torch.randn(2, 3, generator=generator))
    assert (first.dtype, first.device.type) == (torch.float32, "cpu")


def test_batches_and_their_order_change_nothing() -> None:
    together = NoiseStreams([1, 2, 3, 4])
    alone = {seed: NoiseStreams([seed]) for seed in (4, 2, 1, 3)}
    for _ in range(3):
        all_four = together.next((4, 3, 5))
        for index, seed in enumerate((1, 2, 3, 4)):
            assert torch.equal(all_four[index], alone[seed].next((4, 3, 5))[0])


def test_nobody_else_draws_from_a_stream_nor_a_stream_from_others() -> None:
    torch.manual_seed(0)
    expected_global = torch.rand(3)
    torch.manual_seed(0)
    streams = NoiseStreams([5])
    first = streams.next((8,))
    assert torch.equal(torch.rand(3), expected_global)
    torch.manual_seed(99)
    again = NoiseStreams([5])
    torch.rand(10)
    assert torch.equal(again.next((8,)), first)


def test_it_is_standard_normal() -> None:
    noise = NoiseStreams(range(8)).next((4, 64, 64)).double()
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert len({float(value) for value in noise[:, 0, 0, 0]}) == 8


def test_fresh_noise_is_the_next_of_the_stream() -> None:
    x = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    fresh = NoiseStreams([3, 4]).fresh(x)
    assert (fresh.shape, fresh.dtype) == (x.shape, x.dtype)
    assert torch.equal(fresh, NoiseStreams([3, 4]).next((3, 4, 5)).double())


WIDE = (200_000,)
"""Enough samples that a variance is known to 1 %."""


def test_a_brownian_path_has_independent_increments_as_wide_as_the_levels_are_apart() -> None:
    """Covariance of W(a) - W(b) over stretches that touch, overlap, lie in one octave or span many."""
    tree = BrownianTree(1)
    levels = torch.tensor([14.6146, 9.3, 9.2999, 4.0, 2.7, 1.0, 0.73, 0.5, 0.0291672]).tolist()
    steps = [tree.between(WIDE, a, b) for a, b in zip(levels, levels[1:], strict=False)]
    spread = torch.stack(steps).double().cov()
    assert (spread - torch.eye(len(steps))).abs().max() < 5 * (2 / WIDE[0]) ** 0.5
    whole = tree.between(WIDE, levels[0], levels[-1])
    widths = [math.sqrt(a - b) for a, b in zip(levels, levels[1:], strict=False)]
    summed = sum(step * width for step, width in zip(steps, widths, strict=True))
    assert torch.allclose(whole * math.sqrt(levels[0] - levels[-1]), summed, atol=2e-5)


@pytest.mark.parametrize("level", [14.6146, 8.0, 0.0291672])
def test_neighbours_in_single_precision_are_different_points(level: float) -> None:
    above = float(torch.nextafter(torch.tensor(level), torch.tensor(99.0)))
    noise = BrownianTree(5).between(WIDE, above, float(torch.tensor(level))).double()
    assert abs(float(noise.var()) - 1) < 0.02


def test_a_path_is_the_same_whatever_was_asked_before() -> None:
    """And for a run that starts half way down, as image to image does."""
    sigmas = GRIDS["karras"](NoiseSchedule(), 12)[:-1].tolist()
    tree, pairs = BrownianTree(8), list(zip(sigmas, sigmas[1:], strict=False))
    whole = {pair: tree.between((2, 3), *pair) for pair in pairs}
    for pair in reversed(pairs):
        assert torch.equal(BrownianTree(8).between((2, 3), *pair), whole[pair])
        assert torch.equal(tree.between((2, 3), *reversed(pair)), whole[pair])
    assert not torch.equal(BrownianTree(9).between((2, 3), *pairs[0]), whole[pairs[0]])


def test_paths_belong_to_pictures_not_to_batches() -> None:
    x = torch.zeros(3, 4, 2, 2)
    together = NoiseStreams([1, 2, 3]).between(x, 7.0, 3.5)
    for index, seed in enumerate((1, 2, 3)):
        assert torch.equal(NoiseStreams([seed]).between(x[:1], 7.0, 3.5)[0], together[index])


def test_a_path_takes_nothing_from_the_stream() -> None:
    streams, x = NoiseStreams([5]), torch.zeros(1, 8)
    streams.between(x, 2.0, 1.0)
    assert torch.equal(streams.fresh(x), NoiseStreams([5]).fresh(x))
