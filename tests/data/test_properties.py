"""What must hold for every size, table, batch size and number of devices: looked for by hypothesis."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_cli import presets
from sdxl_cli.data.buckets import BucketConfig, Grid, Size
from sdxl_cli.data.geometry import apply_crop, plan_crop
from sdxl_cli.data.manifest import DatasetConfig, Remainder, Row
from sdxl_cli.data.planning import plan_row
from sdxl_cli.data.remainder import effective_repeats, merge_remainders
from sdxl_cli.data.sampler import BucketSampler

PAPER = presets.load("buckets-paper", DatasetConfig).buckets.table()
sides = st.integers(1, 6000)
sizes = st.tuples(sides, sides)
some = settings(max_examples=60, deadline=None)


@some
@given(sizes)
def test_no_bucket_is_nearer_than_the_nearest(size: Size) -> None:
    height, width = PAPER.nearest(size)
    ratio = Fraction(size[0], size[1])
    # distances of logarithms compared exactly, as ratios of whole numbers
    distances = {s: max(Fraction(*s) / ratio, ratio / Fraction(*s)) for s in PAPER.sizes}
    assert distances[height, width] == min(distances.values())


@some
@given(sizes, st.sampled_from([8, 32, 64]))
def test_a_bucket_that_fits_needs_no_enlarging(size: Size, step: int) -> None:
    bucket = PAPER.fitting(size, step)
    if bucket is None:
        assert min(size) < step or max(size) / min(size) > 10
        return
    assert bucket[0] <= size[0]
    assert bucket[1] <= size[1]
    nearest = PAPER.nearest(size)
    if nearest[0] <= size[0] and nearest[1] <= size[1]:
        assert bucket == nearest
    else:
        assert bucket[0] % step == bucket[1] % step == 0
        assert bucket[0] * bucket[1] <= nearest[0] * nearest[1]


@some
@given(
    st.integers(64, 2048),
    st.sampled_from([8, 16, 32, 64]),
    st.integers(64, 1024),
    st.integers(256, 4096),
    st.floats(1, 8),
)
def test_made_tables_are_all_that_fits(side: int, step: int, least: int, most: int, aspect: float) -> None:
    try:
        grid = Grid(area=side * side, step=step, min_side=least, max_side=most, max_aspect=aspect)
    except ValueError:
        candidates = range(-(-least // step) * step, most + 1, step)
        assert not any(s * s <= side * side for s in candidates)
        return
    found = set(grid.sizes())
    every = range(-(-least // step) * step, most + 1, step)
    longest = {
        (short, long)
        for long in every
        for short in every
        if short <= long and short * long <= grid.area < (short + step) * long and long <= aspect * short
    }
    squares = {s for s in found if s[0] == s[1]}
    assert len(squares) <= 1
    assert {(h, w) for h, w in found if h < w} == {(h, w) for h, w in longest if h < w}
    assert {(w, h) for h, w in found} == found


@some
@given(
    sizes,
    st.sampled_from(PAPER.sizes),
    st.sampled_from(["random", "center"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_crops_lie_within_and_sit_tight(
    size: Size, bucket: Size, policy: str, flipped: bool, seed: int
) -> None:
    plan = plan_crop(size, bucket, policy, random.Random(seed), flipped=flipped)  # type: ignore[arg-type]
    exact = max(Fraction(bucket[0], size[0]), Fraction(bucket[1], size[1]))
    for axis in (0, 1):
        assert plan.resized_size[axis] >= bucket[axis]
        assert abs(plan.resized_size[axis] - size[axis] * exact) <= Fraction(1, 2) + Fraction(1, 1000)
        assert 0 <= plan.crop_top_left[axis] <= plan.resized_size[axis] - bucket[axis]
    assert plan.resized_size[0] == bucket[0] or plan.resized_size[1] == bucket[1]


@some
@given(st.integers(8, 90), st.integers(8, 90), st.integers(0, 999))
def test_a_mirrored_crop_is_the_mirror_of_the_recorded_place(height: int, width: int, seed: int) -> None:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    plan = plan_crop((height, width), (16, 16), "random", random.Random(seed), flipped=True)
    rows, columns = plan.resized_size
    whole = np.asarray(
        image.resize((columns, rows), Image.Resampling.LANCZOS) if image.size != (columns, rows) else image
    )
    top, left = plan.crop_top_left
    upright = columns - 16 - left
    expected = whole[top : top + 16, upright : upright + 16][:, ::-1]
    assert np.array_equal(np.asarray(apply_crop(image, plan)), expected)


def a_row(path: str, bucket: Size, repeats: int = 1, crops: int = 1) -> list[Row]:
    """Kept rows without a file."""
    return [
        Row(path=path, stored_size=bucket, resized_size=bucket, scale=1.0, crop_top_left=(0, 0), target_size=bucket,
            crop=k, repeats=repeats)
        for k in range(crops)
    ]  # fmt: skip


groups = st.lists(st.tuples(st.integers(1, 23), st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=4)
BUCKETS: list[Size] = [(64, 128), (64, 96), (96, 64), (128, 64)]


def rows_of(counts: list[tuple[int, int, int]]) -> list[Row]:
    return [
        row
        for bucket, (count, repeats, crops) in zip(BUCKETS, counts, strict=False)
        for i in range(count)
        for row in a_row(f"{bucket}-{i}", bucket, repeats, crops)
    ]


@some
@given(
    groups,
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(["short", "pad", "drop", "merge"]),
    st.integers(0, 4),
)
def test_every_picture_counts_alike_on_any_number_of_devices(
    counts: list[tuple[int, int, int]], batch: int, world: int, remainder: Remainder, epoch: int
) -> None:
    rows = rows_of(counts)
    whole = batch * world
    asked: Counter[str] = Counter()
    for row in rows:
        asked[row.path] = row.repeats
    if remainder == "drop" and not any(c * r >= whole for c, r, _ in counts):
        return
    ranks = [
        BucketSampler(rows, batch, 7, rank=r, world_size=world, remainder=remainder) for r in range(world)
    ]
    plans = [sampler.epoch(epoch) for sampler in ranks]
    assert {len(plan) for plan in plans} == {ranks[0].batches_per_epoch}
    total: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for step in zip(*plans, strict=True):
        assert len({planned.bucket for planned in step}) == 1
        real = [i for planned in step for i, w in zip(planned.indices, planned.weights, strict=True) if w]
        if remainder in ("short", "merge", "drop"):
            seen.update(rows[i].path for i in real)
        for planned in step:
            assert 1 <= len(planned.indices) <= batch
            assert remainder not in ("pad", "drop") or len(planned.indices) == batch
            for index, weight in zip(planned.indices, planned.weights, strict=True):
                assert rows[index].target_size == planned.bucket
                # what mean(weight * loss), averaged over ranks, has of this picture's loss
                total[rows[index].path] += weight / len(planned.indices) / world * whole  # type: ignore[assignment]
    if remainder == "drop":
        for bucket, (count, repeats, _) in zip(BUCKETS, counts, strict=False):
            of_bucket = [total[f"{bucket}-{i}"] for i in range(count)]
            shown = count * repeats // whole * whole
            assert math.isclose(sum(of_bucket), count * repeats if shown else 0.0, abs_tol=1e-9)
    else:
        assert all(math.isclose(total[path], asked[path], abs_tol=1e-9) for path in asked)
    if remainder in ("short", "merge"):
        assert seen == asked


@some
@given(groups, st.integers(1, 9), st.sampled_from([1, 2, 3]), st.integers(0, 60))
def test_ranks_never_share_a_picture_and_resuming_changes_nothing(
    counts: list[tuple[int, int, int]], batch: int, world: int, step: int
) -> None:
    rows = rows_of([(count, 1, crops) for count, _, crops in counts])
    fresh = [BucketSampler(rows, batch, 3, rank=r, world_size=world) for r in range(world)]
    planned = [sampler.at(step) for sampler in fresh]
    used = [i for p in planned for i, w in zip(p.indices, p.weights, strict=True) if w]
    assert len(used) == len(set(used))
    walked = [BucketSampler(rows, batch, 3, rank=r, world_size=world) for r in range(world)]
    for earlier in range(step):
        for sampler in walked:
            sampler.at(earlier)
    assert [sampler.at(step) for sampler in walked] == planned


@some
@given(groups, st.integers(1, 9), st.sampled_from(["short", "pad", "drop"]))
def test_the_table_of_repeats_is_what_the_sampler_does(
    counts: list[tuple[int, int, int]], batch: int, remainder: Remainder
) -> None:
    rows = rows_of(counts)
    table = effective_repeats(rows, batch, remainder)
    steps = sum(line.batches for line in table)
    if not steps:
        return
    sampler = BucketSampler(rows, batch, remainder=remainder)
    assert sampler.batches_per_epoch == steps
    for line in table:
        batches = [b for b in sampler.epoch(0) if b.bucket == line.bucket]
        shown = sum(len(b.indices) for b in batches)
        assert len(batches) == line.batches
        assert shown == line.pictures + line.filled - line.dropped
        assert math.isclose(line.unequalised, len(batches) * batch / line.pictures)


@some
@given(st.lists(sizes, min_size=1, max_size=60), st.integers(2, 8), st.booleans())
def test_merging_moves_few_leaves_at_most_one_ragged_and_stays_true(
    pictures: list[Size], batch: int, upscaling: bool
) -> None:
    config = DatasetConfig(
        buckets=BucketConfig(sizes=PAPER.sizes),
        remainder="merge",
        batch_size=batch,
        max_upscale=None if upscaling else 50.0,
    )
    rows = [
        plan_row(Row(path=str(i), stored_size=size), PAPER.nearest(size), config, 0)
        for i, size in enumerate(pictures)
    ]
    merged = merge_remainders(rows, config)
    counts = Counter(row.target_size for row in merged)
    assert sorted(row.path for row in merged) == sorted(row.path for row in rows)
    if upscaling:
        assert sum(count % batch > 0 for count in counts.values()) <= 1
    for before, after in zip(rows, merged, strict=True):
        assert after.target_size in {row.target_size for row in rows}
        assert ("merged" in after.notes) == (after.target_size != before.target_size)
        assert upscaling or before.plan.scale > 50 or after.plan.scale <= 50
        again = plan_row(before, after.plan.target_size, config, 0)
        assert after.plan == again.plan
