from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxl_cli.data.cache import LatentCache, weights_hash
from sdxl_cli.data.loader import BatchLoader, read_image
from sdxl_cli.data.manifest import DatasetConfig, Manifest
from sdxl_cli.data.scan import read_pixels
from sdxl_cli.errors import FileError, NumericError, UsageError
from tests.data.pictures import TINY, make_manifest, noise

CONFIG = DatasetConfig(buckets=TINY)


def encode(images: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in: averages over 8x8 blocks, which float16 keeps to three digits."""
    mean = torch.nn.functional.avg_pool2d(images, 8)
    return torch.cat([mean, mean[:, :1]], 1), torch.zeros(len(images), 4, *mean.shape[2:]) - 7


def fill(cache: LatentCache, manifest: Manifest, **options: int) -> int:
    return sum(cache.fill(manifest.kept, lambda row: read_image(manifest, row), encode, **options))


@pytest.fixture
def manifest(pictures: Path) -> Manifest:
    return make_manifest(pictures, CONFIG)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_the_pixels_and_what_the_manifest_says_of_them(
    manifest: Manifest, workers: int
) -> None:
    loader = BatchLoader(manifest, 4, seed=2, workers=workers)
    by_path = {row.path: row for row in manifest.rows}
    for step in (0, 1, 5, 3, 3):
        batch = loader.batch(step)
        assert batch.images is not None
        assert batch.images.dtype == torch.float32
        assert len(batch) == len(batch.images) == len(batch.captions)
        for i, path in enumerate(batch.ids):
            row = by_path[path]
            pixels = torch.from_numpy(read_pixels(manifest.root, row, CONFIG))
            assert torch.equal(((batch.images[i] + 1) * 127.5).round().byte(), pixels.permute(2, 0, 1))
            assert batch.original_size[i] == row.original_size
            assert batch.crop_top_left[i] == row.crop_top_left
            assert batch.target_size[i] == row.target_size == tuple(batch.images.shape[2:])
            assert batch.captions[i] in row.captions
            assert batch.aesthetic_score[i] == (4.5 if path == "03.png" else 6.0)


def test_a_picture_that_changed_stops_the_run(manifest: Manifest) -> None:
    for path in manifest.root.glob("*.png"):
        noise(100, 150, 77).save(path)
    with pytest.raises(FileError, match="make the manifest again"):
        BatchLoader(manifest, 4).batch(0)


def test_no_pictures_no_loader(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="keeps no pictures"):
        BatchLoader(replace(manifest, rows=()), 4)


def test_cached_latents_are_those_of_the_pictures(manifest: Manifest, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path / "cache", "vae", CONFIG.hygiene)
    assert fill(cache, manifest, batch_size=3, shard_items=5) == 13
    again = LatentCache(tmp_path / "cache", "vae", CONFIG.hygiene)
    from_cache, from_pictures = BatchLoader(manifest, 4, cache=again), BatchLoader(manifest, 4)
    for step in range(from_cache.sampler.batches_per_epoch):
        cached, fresh = from_cache.batch(step), from_pictures.batch(step)
        assert cached.ids == fresh.ids
        assert cached.latents is not None
        assert fresh.images is not None
        mean, logvar = encode(fresh.images)
        torch.testing.assert_close(cached.latents.mean, mean, atol=1e-3, rtol=1e-3)
        assert torch.equal(cached.latents.logvar, logvar)


def test_interrupted_caching_goes_on_where_it_was(manifest: Manifest, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "vae", CONFIG.hygiene)
    steps = cache.fill(
        manifest.kept, lambda row: read_image(manifest, row), encode, batch_size=2, shard_items=4
    )
    done = next(steps) + next(steps) + next(steps)
    steps.close()
    resumed = LatentCache(tmp_path, "vae", CONFIG.hygiene)
    assert len(resumed.missing(manifest.kept)) == 13 - done
    assert fill(resumed, manifest) == 13 - done
    assert fill(resumed, manifest) == 0


def test_only_what_changed_is_encoded_again(manifest: Manifest, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "vae", CONFIG.hygiene)
    fill(cache, manifest)
    noise(100, 150, 50).save(manifest.root / "00.png")
    changed = make_manifest(manifest.root, CONFIG)
    assert [row.path for row in cache.missing(changed.kept)] == ["00.png"]
    assert cache.stale(changed.kept) == 1
    with pytest.raises(UsageError, match="1 of 13"):
        BatchLoader(changed, 4, cache=cache)
    with pytest.raises(FileError, match=r"nothing is cached for 00\.png"):
        cache.read(changed.kept[:1])
    assert fill(cache, changed) == 1


@pytest.mark.parametrize("what", ["vae", "dtype", "background", "seed"])
def test_another_encoder_dtype_background_or_crop_is_another_item(
    manifest: Manifest, tmp_path: Path, what: str
) -> None:
    fill(LatentCache(tmp_path, "vae", CONFIG.hygiene), manifest)
    hygiene = replace(CONFIG.hygiene, background=(0, 0, 0)) if what == "background" else CONFIG.hygiene
    dtype = torch.float32 if what == "dtype" else torch.float16
    cache = LatentCache(tmp_path, "other" if what == "vae" else "vae", hygiene, dtype=dtype)
    rows = make_manifest(manifest.root, replace(CONFIG, seed=9)).kept if what == "seed" else manifest.kept
    expected = sum(a.crop_top_left != b.crop_top_left for a, b in zip(rows, manifest.kept, strict=True))
    assert len(cache.missing(rows)) == (expected if what == "seed" else 13)
    assert expected > 0 or what != "seed"


def test_latents_that_are_not_finite_are_not_cached(manifest: Manifest, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "vae", CONFIG.hygiene)
    with pytest.raises(NumericError, match="float32"):
        list(
            cache.fill(
                manifest.kept,
                lambda row: read_image(manifest, row),
                lambda x: (encode(x)[0] / 0, encode(x)[1]),
            )
        )
    assert len(cache.missing(manifest.kept)) == 13


def test_the_hash_of_weights_sees_every_bit() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.float16)}
    same = {"b": weights["b"].clone(), "a": weights["a"].clone()}
    assert weights_hash(weights) == weights_hash(same)
    same["a"][1] = 1e-30
    assert weights_hash(weights) != weights_hash(same)
