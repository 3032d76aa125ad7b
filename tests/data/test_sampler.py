from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from sdxl_cli.data.manifest import DatasetConfig, Remainder, Row
from sdxl_cli.data.sampler import BucketSampler, SamplerState, choose_caption
from tests.data.pictures import TINY, make_manifest


def rows(counts: dict[tuple[int, int], int], crops: int = 1) -> list[Row]:
    return [
        Row(
            path=f"{size}-{i}", resized_size=size, scale=1.0, crop_top_left=(0, 0), target_size=size, crop=k,
            captions=("a", "b", "c"),
        )
        for size, count in counts.items()
        for i in range(count)
        for k in range(crops)
    ]  # fmt: skip


MANY = {(64, 96): 37, (80, 80): 90, (96, 64): 11}


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_an_epoch_shows_every_picture_once_in_batches_of_one_bucket(batch_size: int) -> None:
    data = rows(MANY)
    sampler = BucketSampler(data, batch_size, seed=1)
    for epoch in range(3):
        batches = sampler.epoch(epoch)
        assert len(batches) == sampler.batches_per_epoch
        assert sorted(i for b in batches for i in b.indices) == list(range(len(data)))
        for batch in batches:
            assert {data[i].target_size for i in batch.indices} == {batch.bucket}
        assert sum(len(b.indices) < batch_size for b in batches) <= len(MANY)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    data = rows(MANY)
    one, other = BucketSampler(data, 4, seed=1), BucketSampler(data, 4, seed=2)
    assert one.epoch(0) == BucketSampler(data, 4, seed=1).epoch(0)
    assert one.epoch(0) != one.epoch(1)
    assert one.epoch(0) != other.epoch(0)


def test_any_step_is_had_without_those_before_it() -> None:
    data = rows(MANY)
    run = list(islice(BucketSampler(data, 4), 100))
    assert [BucketSampler(data, 4).at(step) for step in range(100)] == run


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped() -> None:
    data = rows(MANY)
    whole = list(islice(BucketSampler(data, 4), 90))
    first = BucketSampler(data, 4)
    begun = list(islice(first, 47))
    second = BucketSampler(data, 4)
    second.state = first.state
    assert begun + list(islice(second, 43)) == whole
    assert second.state == SamplerState(90 // first.batches_per_epoch, 90 % first.batches_per_epoch)


def test_buckets_are_interleaved_in_proportion() -> None:
    batches = BucketSampler(rows({(64, 96): 100, (80, 80): 300}), 4, seed=3).epoch(0)
    for quarter in range(4):
        share = Counter(b.bucket for b in batches[quarter * 25 : (quarter + 1) * 25])
        assert abs(share[(80, 80)] - 18.75) <= 2


def test_an_epoch_uses_one_crop_of_a_picture_and_the_next_another() -> None:
    data = rows(MANY, crops=3)
    sampler = BucketSampler(data, 4)
    assert sampler.pictures == 138
    for epoch in range(4):
        used = [data[i] for b in sampler.epoch(epoch) for i in b.indices]
        assert len({row.path for row in used}) == len(used) == 138
        assert {row.crop for row in used} == {epoch % 3}


def test_captions_are_chosen_by_seed_epoch_and_picture() -> None:
    data = rows({(64, 96): 300})
    chosen = [choose_caption(row, 0, 0) for row in data]
    assert chosen == [choose_caption(row, 0, 0) for row in data]
    assert all(70 <= count <= 130 for count in Counter(chosen).values())
    assert chosen != [choose_caption(row, 0, 1) for row in data]
    assert choose_caption(Row(path="x"), 0, 0) == ""


def test_real_rows(pictures: Path) -> None:
    manifest = make_manifest(pictures, DatasetConfig(buckets=TINY))
    assert BucketSampler(manifest.kept, 3).pictures == 13


@pytest.mark.parametrize("remainder", ["short", "pad", "drop"])
@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (1, 2), (3, 1), (1, 5), (3, 2), (7, 1)])
def test_another_number_of_processes_deals_the_same_batches_out(
    processes: int, parts: int, remainder: Remainder
) -> None:
    """Every picture is in one hand, at its own place, and counts in the mean over hands what it counts alone."""
    data = rows(MANY)
    whole = BucketSampler(data, 6, seed=1, remainder=remainder)
    hands = [
        BucketSampler(
            data, 2, seed=1, rank=r, world_size=processes, together=6, parts=parts, remainder=remainder
        )
        for r in range(processes)
    ]
    assert {hand.batches_per_epoch for hand in hands} == {whole.batches_per_epoch * parts}
    for step in range(2 * whole.batches_per_epoch):
        alone = whole.at(step)
        count = Counter[tuple[int, int]]()
        for hand in hands:
            for batch in (hand.at(step * parts + part) for part in range(parts)):
                assert batch.bucket == alone.bucket
                for index, place, weight in zip(batch.indices, batch.places, batch.weights, strict=True):
                    count[index, place] += weight / len(batch.indices) / (processes * parts)
        expected = {
            (index, place): weight / len(alone.indices)
            for index, place, weight in zip(alone.indices, alone.places, alone.weights, strict=True)
        }
        assert {key: value for key, value in count.items() if value} == pytest.approx(expected)
