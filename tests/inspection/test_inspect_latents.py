"""``sdxl inspect-latents`` from its inputs to its report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdxl_cli import cli
from sdxl_cli.checkpoint.write import save_vae
from sdxl_cli.data.cache import LatentCache, weights_hash
from sdxl_cli.data.loader import read_image, to_tensor
from sdxl_cli.data.manifest import read_manifest
from sdxl_cli.errors import FileError
from sdxl_cli.inspection.findings import LatentReport
from sdxl_cli.inspection.latents import InspectRequest, inspect_latents
from sdxl_cli.inspection.latents_page import require_room, write
from sdxl_cli.metrics.similarity import psnr
from sdxl_cli.model.vae import Autoencoder
from tests.inspection.conftest import SMALL

Write = Callable[..., Path]


def look(*inputs: Path, output: Path | None = None, **options: Any) -> LatentReport:
    request = InspectRequest(inputs=inputs, **options)
    require_room(output, None)
    return write(inspect_latents(request), request, output, None)


def image(path: Path) -> Tensor:
    return to_tensor(np.array(Image.open(path).convert("RGB")))


def make_manifest(pictures: Path, *options: str) -> Path:
    (pictures.parent / "b.toml").write_text("[buckets]\nsizes = [[32, 32], [32, 48]]\n")
    path = pictures.parent / "m.parquet"
    preset = ["--preset", str(pictures.parent / "b.toml"), *options, "-q"]
    assert cli.run(["bucket-dataset", str(pictures), *preset, "-o", str(path)]) == 0
    return path


def test_a_gaussian_of_known_scale_is_told_as_it_is(latents: Write) -> None:
    """Channels of means 0, 1, 2, 3 and deviation 7.7: what 0.13025 is for."""
    values = torch.randn(50, 4, 16, 16, generator=torch.Generator().manual_seed(0)) / 0.13025
    report = look(latents(x=values + torch.arange(4.0).view(4, 1, 1)), scale_factor=0.13025)
    assert [c.mean for c in report.channels] == pytest.approx([0, 1, 2, 3], abs=0.3)
    assert [c.std * 0.13025 for c in report.channels] == pytest.approx([1] * 4, rel=0.02)
    assert report.scaled_std == pytest.approx(math.sqrt(1 + 1.25 * 0.13025**2), rel=0.01)
    assert report.measured_scale_factor == pytest.approx(0.13025, rel=0.03)
    assert report.scale_fits
    assert (report.inspected, report.vae, report.quality.psnr) == (50, None, None)
    off_diagonal = torch.tensor(report.correlation) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 0.05


def test_another_scale_does_not_fit(latents: Write) -> None:
    report = look(latents(x=torch.randn(8, 4, 16, 16)), scale_factor=0.13025)
    assert not report.scale_fits
    assert report.measured_scale_factor == pytest.approx(1.0, rel=0.1)


def test_latents_that_generation_made_are_scaled_already(
    latents: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = latents(x=torch.randn(8, 4, 16, 16))
    assert look(path, scale_factor=0.13025, latents_are_scaled=True).scale_fits
    assert "--scaled" not in capsys.readouterr().err
    look(path, scale_factor=0.13025)
    assert "then add --scaled" in capsys.readouterr().err


def test_the_latents_of_pictures_are_samples_of_the_encoders_posterior(
    pictures: Path, vae: Autoencoder, vae_file: Path
) -> None:
    report = look(pictures / "a.png", vae=str(vae_file))
    moments = vae.encode(image(pictures / "a.png")[None])
    noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(0))
    sample = moments.sample(noise)[0].flatten(1).double()
    assert [c.mean for c in report.channels] == pytest.approx(sample.mean(1).tolist(), rel=1e-5)
    assert [c.std for c in report.channels] == pytest.approx(sample.std(1, correction=0).tolist(), rel=1e-5)
    spread = moments.logvar.exp().mean((0, 2, 3)).sqrt().tolist()
    assert report.posterior_std == pytest.approx(spread, rel=1e-5)
    assert report.scale_factor == 0.5
    assert report.scaled_std == pytest.approx(0.5 * float(sample.std(correction=0)), rel=1e-5)


def test_reconstructions_are_measured_and_the_worst_comes_first(
    pictures: Path, vae: Autoencoder, vae_file: Path
) -> None:
    report = look(pictures, vae=str(vae_file))
    assert {r.name for r in report.reconstructions} == {"a.png", "b.png", "c.jpg"}
    qualities = {r.name: r.psnr for r in report.reconstructions}
    assert list(qualities.values()) == sorted(qualities.values())
    assert report.quality.psnr == pytest.approx(np.mean(list(qualities.values())))
    original = image(pictures / "b.png")
    again = vae.decode(vae.encode(original[None]).mode())[0]
    assert qualities["b.png"] == pytest.approx(float(psnr(original[None], again[None])), rel=1e-4)


def test_a_picture_is_cut_to_the_middle_that_the_autoencoder_can_read(
    pictures: Path, vae: Autoencoder, vae_file: Path
) -> None:
    report = look(pictures / "c.jpg", vae=str(vae_file))
    middle = image(pictures / "c.jpg")[:, 2:42, 2:34]
    again = vae.decode(vae.encode(middle[None]).mode())[0]
    assert report.reconstructions[0].psnr == pytest.approx(float(psnr(middle[None], again[None])), rel=1e-4)


def test_large_pictures_are_shrunk(pictures: Path, vae_file: Path) -> None:
    Image.new("RGB", (400, 200)).save(pictures / "large.png")
    report = look(pictures / "large.png", vae=str(vae_file), max_side=80)
    assert report.channels[0].count == (80 // 8) * (40 // 8)
    assert look(pictures / "large.png", vae=str(vae_file), max_side=0).channels[0].count == 50 * 25


def test_the_crops_of_a_manifest_are_what_training_sees(pictures: Path, vae_file: Path) -> None:
    path = make_manifest(pictures, "--crops-per-image", "2")
    report = look(path, vae=str(vae_file))
    kept = read_manifest(path).kept
    assert report.inspected == len(kept) == 6
    assert {r.name for r in report.reconstructions} == {f"{row.path}#{row.crop}" for row in kept}


def test_a_cache_has_the_statistics_of_its_pictures(
    pictures: Path, vae: Autoencoder, vae_file: Path, tmp_path: Path
) -> None:
    """Encoded before or now: means agree to the digits that float16 keeps; no autoencoder is asked for."""
    manifest = read_manifest(make_manifest(pictures))
    cache = LatentCache(tmp_path / "cached", weights_hash(vae.state_dict()), manifest.config.hygiene)

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        moments = vae.encode(images)
        return moments.mean, moments.logvar

    assert sum(cache.fill(manifest.kept, lambda row: read_image(manifest, row), encode)) == 3
    stored = look(tmp_path / "cached", scale_factor=0.5)
    fresh = look(pictures.parent / "m.parquet", vae=str(vae_file))
    assert (stored.vae, stored.reconstructions, stored.inspected) == (None, (), 3)
    assert stored.together.count == fresh.together.count
    assert stored.posterior_std == pytest.approx(fresh.posterior_std, rel=1e-2)
    assert stored.together.std == pytest.approx(fresh.together.std, rel=0.1)
    (shard,) = (tmp_path / "cached").glob("*.safetensors")
    assert look(shard, scale_factor=0.5).together == stored.together


def test_what_is_not_finite_is_named_and_ends_with_4(
    latents: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    values = torch.randn(3, 4, 8, 8)
    values[1, 2, 0, 0] = math.nan
    values[2, 0, 0, :3] = math.inf
    assert cli.run(["inspect-latents", str(latents(x=values)), "--scale-factor", "1"]) == 4
    said = capsys.readouterr()
    assert "NaN or infinity in 2 of 3: x[1], x[2]" in said.err
    counts = [line.split()[-1] for line in said.out.splitlines()[1:6]]
    assert counts == ["3", "0", "1", "0", "4"]


def test_an_autoencoder_that_overflows_is_found_out(pictures: Path, vae: Autoencoder, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    state["decoder.conv_out.bias"].fill_(math.inf)
    save_vae(tmp_path / "broken.safetensors", state, SMALL)
    report = look(pictures / "a.png", vae=str(tmp_path / "broken.safetensors"))
    assert report.not_finite == ("a.png (decoded)",)
    state["encoder.conv_in.bias"].fill_(math.nan)
    save_vae(tmp_path / "worse.safetensors", state, SMALL)
    report = look(pictures / "a.png", vae=str(tmp_path / "worse.safetensors"), output=tmp_path / "out")
    assert report.not_finite == ("a.png", "a.png (decoded)")
    assert report.together.count == 0
    assert len(report.files) == 3


def test_a_picture_that_cannot_be_read_is_left_out_and_said(
    pictures: Path, vae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:200])
    Image.new("RGB", (4, 4)).save(pictures / "dot.png")
    report = look(pictures, vae=str(vae_file))
    assert (report.found, report.inspected, len(report.unusable)) == (5, 3, 2)
    said = capsys.readouterr().err
    assert "broken.png: truncated" in said
    assert "dot.png: is smaller than 8 pixels" in said
    with pytest.raises(FileError, match="truncated"):
        look(pictures / "broken.png", vae=str(vae_file))


def test_many_are_thinned_out_evenly_and_it_is_said(
    latents: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    values = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 4, 2, 2)
    report = look(latents(x=values.contiguous()), scale_factor=1.0, limit=5)
    assert (report.found, report.inspected) == (10, 5)
    assert report.together.mean == 4.0  # 0, 2, 4, 6, 8
    assert "5 of 10 are looked at" in capsys.readouterr().err
    assert look(latents(x=values.contiguous()), scale_factor=1.0, limit=0).inspected == 10


def test_the_sheets_show_what_was_measured(pictures: Path, vae_file: Path, tmp_path: Path) -> None:
    report = look(pictures, vae=str(vae_file), output=tmp_path / "out")
    names = ["reconstructions.png", "channels.png", "report.html"]
    assert [path.name for path in report.files] == names
    compared = np.asarray(Image.open(report.files[0]))
    assert compared.shape[2] == 3
    # b.png is 64 pixels, enlarged four times: look for its first row of pixels
    first = np.repeat(np.asarray(Image.open(pictures / "b.png"))[0], 4, axis=0)
    rows = [row for row in compared if (row[12 : 12 + 256] == first).all()]
    assert len(rows) == 4
    maps = Image.open(report.files[1])
    assert maps.width > 4 * 100
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["report"]["together"]["std"] == report.together.std
    assert written["request"]["inputs"] == [str(pictures)]


def test_a_map_is_red_above_zero_blue_below_and_green_where_there_is_no_number() -> None:
    from sdxl_cli.inspection.sheets import channel_maps

    latent = torch.tensor([[[3.0, -3.0], [0.0, math.nan]], [[9.0, -9.0], [1.5, -math.inf]]])
    first, second = (np.asarray(cell) for cell in channel_maps("x", latent, side=2).cells)
    assert first.tolist() == [[[255, 0, 0], [0, 0, 255]], [[255, 255, 255], [0, 200, 0]]]
    assert second[0].tolist() == first[0].tolist()
    assert second[1].tolist() == [[255, 128, 128], [0, 200, 0]]


def test_nothing_is_overwritten(latents: Write, tmp_path: Path) -> None:
    path = latents(x=torch.randn(2, 4, 4, 4))
    look(path, scale_factor=1.0, output=tmp_path / "out")
    before = (tmp_path / "out" / "channels.png").read_bytes()
    with pytest.raises(FileError, match=r"channels\.png exists already"):
        look(path, scale_factor=2.0, output=tmp_path / "out")
    assert (tmp_path / "out" / "channels.png").read_bytes() == before


def test_json_is_the_whole_report(latents: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = latents(x=torch.randn(5, 4, 8, 8))
    assert cli.run(["inspect-latents", str(path), "--scale-factor", "1", "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["channels"]) == 4
    assert report["together"]["count"] == 5 * 4 * 64
    assert report["not_finite"] == []


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"x": torch.zeros(4, 4)}, r"x is F32 \[4, 4\]; latents are floats"),
        ({"x": torch.zeros(1, 4, 2, 2, dtype=torch.int64)}, "x is I64"),
        ({"x": torch.zeros(4, 0, 16)}, r"latents\.safetensors: x is \[4, 0, 16\], which holds nothing"),
        ({"x": torch.zeros(0, 4, 8, 8)}, "which holds nothing"),
        ({"x": torch.zeros(4, 2, 2), "y": torch.zeros(8, 2, 2)}, "channels, .* has"),
    ],
)
def test_files_of_something_else_are_refused(tensors: dict[str, Tensor], says: str, latents: Write) -> None:
    with pytest.raises(FileError, match=says):
        look(latents(**tensors), scale_factor=1.0)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize(
    ("flags", "whose"),
    [
        (["--vae", "bundled"], "sdxl-tiny-base"),
        (["--fp16-audit", "vae"], "sdxl-tiny-base"),
        (["--fp16-audit", "unet"], "the model's U-Net"),
    ],
)
def test_latents_of_another_kind_of_autoencoder_are_not_decoded(
    channels: int, flags: list[str], whose: str, latents: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    for shape in ((channels, 8, 8), (2, channels, 8, 8)):
        path = latents(x=torch.zeros(shape))
        assert cli.run(["inspect-latents", str(path), "--model", "bundled", *flags]) == 3
        said = capsys.readouterr().err
        assert re.search(rf"{path.name}: x.* has {channels} channels, the latents of {whose} have 4", said)


def test_a_model_in_place_of_latents_is_recognised(vae_file: Path) -> None:
    with pytest.raises(FileError, match="is a VAE; give pictures or latents, and the model with --vae"):
        look(vae_file, scale_factor=1.0)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        look(tmp_path / "nothing.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="holds no pictures"):
        look(tmp_path / "empty")
