"""``sdxl cache-dataset`` with the bundled model, and features of captions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdxl_cli import cli
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model, load_vae
from sdxl_cli.data.cache import LatentCache, TextCache, weights_hash
from sdxl_cli.data.loader import BatchLoader, read_image
from sdxl_cli.data.manifest import DatasetConfig, Manifest, read_manifest, write_manifest
from sdxl_cli.errors import FileError, NumericError, UsageError
from sdxl_cli.generation.encode import encode_text
from sdxl_cli.model.conditioning import TextFeatures
from tests.data.pictures import TINY, make_manifest

CONFIG = DatasetConfig(buckets=TINY)


def features(captions: list[str] | tuple[str, ...]) -> TextFeatures:
    """A stand-in that tells captions apart."""
    values = torch.tensor([[float(sum(c.encode())), len(c)] for c in captions])
    return TextFeatures(values[:, None].expand(-1, 77, 2).contiguous(), values)


@pytest.fixture
def manifest(pictures: Path) -> Manifest:
    return make_manifest(pictures, CONFIG)


def captions_of(manifest: Manifest) -> list[str]:
    return [caption for row in manifest.kept for caption in row.captions]


def test_features_come_back_for_their_captions_and_the_empty_one(manifest: Manifest, tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "encoders", dtype=torch.float32)
    captions = captions_of(manifest)
    assert sum(cache.fill(captions, features, batch_size=5, shard_items=7)) == len(set(captions)) + 1
    again = TextCache(tmp_path, "encoders", dtype=torch.float32)
    assert again.missing(["", *captions]) == []
    asked = ["", captions[3], captions[0], captions[3]]
    found = again.read(asked)
    assert torch.equal(found.pooled, features(asked).pooled)
    assert torch.equal(found.crossattn, features(asked).crossattn)
    assert again.missing(["new", captions[0], "new"]) == ["new"]
    with pytest.raises(FileError, match="'new'"):
        again.read(["new"])
    assert TextCache(tmp_path, "others", dtype=torch.float32).missing(captions[:1]) == captions[:1]
    assert TextCache(tmp_path, "encoders").missing(captions[:1]) == captions[:1]
    assert again.stale(captions[1:]) == 1


def test_a_batch_has_the_features_of_the_captions_it_chose(manifest: Manifest, tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "encoders", dtype=torch.float32)
    with pytest.raises(UsageError, match="captions are not cached"):
        BatchLoader(manifest, 4, text=cache)
    list(cache.fill(captions_of(manifest), features))
    loader = BatchLoader(manifest, 4, text=cache, workers=2)
    for step in range(5):
        batch = loader.batch(step)
        assert batch.text is not None
        assert torch.equal(batch.text.pooled, features(batch.captions).pooled)
    loader.close()


def test_features_that_are_not_finite_are_not_cached(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "encoders")
    with pytest.raises(NumericError, match="float32"):
        list(cache.fill(["a"], lambda c: TextFeatures(features(c).crossattn / 0, features(c).pooled)))
    assert cache.missing(["a"]) == ["a"]


def test_ranks_read_their_own_parts_and_together_everything(manifest: Manifest) -> None:
    loaders = [BatchLoader(manifest, 2, rank=rank, world_size=3, seed=1) for rank in range(3)]
    steps = loaders[0].sampler.batches_per_epoch
    seen: list[str] = []
    for step in range(steps):
        batches = [loader.batch(step) for loader in loaders]
        assert len({tuple(b.images.shape[2:]) for b in batches if b.images is not None}) == 1
        seen += [path for b in batches for path, w in zip(b.ids, b.weight.tolist(), strict=True) if w]
    assert sorted(seen) == sorted(row.path for row in manifest.kept)
    for loader in loaders:
        loader.close()


def test_pinned_memory_needs_a_device_to_be_pinned_for(manifest: Manifest) -> None:
    if torch.cuda.is_available():
        assert BatchLoader(manifest, 2, pin_memory=True).batch(0).images.is_pinned()  # type: ignore[union-attr]
        return
    with pytest.raises(UsageError, match="CUDA"):
        BatchLoader(manifest, 2, pin_memory=True)


def test_the_command_encodes_what_the_bundled_model_makes_and_only_once(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(manifest, rows=manifest.rows[:3])
    data, folder = tmp_path / "m.parquet", tmp_path / "cache"
    write_manifest(data, small)
    command = [
        "cache-dataset",
        str(data),
        "-o",
        str(folder),
        "-m",
        "bundled",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--json",
    ]
    assert cli.run(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["latents"] == {"wanted": 3, "encoded": 3, "stale": 0}
    assert first["text"] == {"wanted": 7, "encoded": 7, "stale": 0}
    assert cli.run(command) == 0
    assert json.loads(capsys.readouterr().out)["latents"]["encoded"] == 0

    vae = load_vae(locate("bundled", "vae"), dtype=torch.float32)
    rows = read_manifest(data).kept
    cache = LatentCache(folder, weights_hash(vae.state_dict()), CONFIG.hygiene, dtype=torch.float32)
    mean, _ = cache.read(rows[:1])
    with torch.no_grad():
        torch.testing.assert_close(
            mean[0], vae.encode(read_image(small, rows[0])[None]).mean[0], atol=1e-4, rtol=1e-4
        )
    model = load_model(locate("bundled", "model"), ["text"], dtype=torch.float32, vae_dtype=torch.float32)
    text = TextCache(folder, weights_hash(model.conditioner.state_dict()), dtype=torch.float32)
    for caption in ("", rows[1].captions[0]):
        with torch.no_grad():
            alone = encode_text(model.conditioner, caption, None, torch.device("cpu"))
        torch.testing.assert_close(text.read([caption]).crossattn, alone.crossattn)
        torch.testing.assert_close(text.read([caption]).pooled, alone.pooled)


@pytest.mark.parametrize(
    ("args", "message"), [(["--dtype", "fp8"], "fp16"), (["--no-latents", "--no-text"], "nothing to do")]
)
def test_what_cannot_be_done_is_one_line(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    write_manifest(tmp_path / "m.parquet", manifest)
    assert cli.run(["cache-dataset", str(tmp_path / "m.parquet"), *args]) == 2
    assert message in capsys.readouterr().err
