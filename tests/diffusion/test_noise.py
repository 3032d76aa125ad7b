"""Random numbers belong to a picture, not to its batch."""

from __future__ import annotations

import torch

from sdxl_cli.diffusion.noise import NoiseStreams


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
