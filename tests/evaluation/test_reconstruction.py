"""Autoencoders measured: numbers beside torchmetrics' on pictures made by hand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from sdxl_cli import cli
from sdxl_cli.checkpoint.write import save_vae
from sdxl_cli.commands._eval_reconstruction import _precision
from sdxl_cli.evaluation.reconstruction import _Work
from sdxl_cli.evaluation.table import Columns
from sdxl_cli.metrics.lpips import load_lpips
from sdxl_cli.model.vae import Autoencoder
from tests.evaluation.conftest import SMALL, draw, scores

Run = Callable[..., dict[str, Any]]


def test_the_numbers_are_those_of_the_saved_reconstructions(
    vae: Autoencoder,
    vae_file: Path,
    lpips_file: Path,
    inception_file: Path,
    run: Run,
) -> None:
    networks = ("--lpips-net", "alex", "--lpips-weights", lpips_file, "--inception-weights", inception_file)
    pictures = draw(Path("pictures"), 3, 0)
    content = run(
        "reconstruction", pictures, "--vae", vae_file, "--size", 64, "--batch-size", 2, "-o", "a", *networks
    )
    found = scores(content)
    originals, again = Path("originals"), Path("again")
    psnrs, ssims, distances = [], [], []
    lpips = load_lpips("alex", [lpips_file])
    for folder in (originals, again):
        folder.mkdir()
    for path in sorted(pictures.iterdir()):
        # 80 x 72: the short side is 72
        small = Image.open(path).resize((71, 64), Image.Resampling.BICUBIC).crop((3, 0, 67, 64))
        small.save(originals / path.name)
        image = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            decoded = vae.decode(vae.encode(image.float() / 127.5 - 1).mode())
            levels = ((decoded + 1) * 127.5).clamp(0, 255).round()
            psnrs.append(peak_signal_noise_ratio(levels, image.float(), data_range=255.0))
            ssims.append(structural_similarity_index_measure(levels, image.float(), data_range=255.0))
            distances.append(lpips(levels / 127.5 - 1, image.float() / 127.5 - 1))
        Image.fromarray(levels[0].permute(1, 2, 0).to(torch.uint8).numpy()).save(again / path.name)
    assert found["PSNR"]["value"] == pytest.approx(float(torch.stack(psnrs).mean()), rel=1e-4)
    assert found["SSIM"]["value"] == pytest.approx(float(torch.stack(ssims).mean()), abs=1e-4)
    assert found["LPIPS"]["value"] == pytest.approx(float(torch.cat(distances).mean()), rel=1e-4)
    spread = torch.stack(psnrs).double().std() / 3**0.5
    assert found["PSNR"]["spread"] == pytest.approx(float(spread), rel=1e-3)
    kept = [_features(run, folder, inception_file) for folder in (originals, again)]
    assert found["rFID"]["value"] == pytest.approx(_small_frechet(*kept), rel=1e-3)
    assert content["paper"]["rows"]["SDXL-VAE"]["rFID"] == 4.4


def _features(run: Run, folder: Path, inception_file: Path) -> Tensor:
    path = Path(f"{folder.name}.npz")
    run("statistics", folder, "--features", "--inception-weights", inception_file, "-o", path)
    with np.load(path) as content:
        return torch.from_numpy(content["features"]).double()


def _small_frechet(one: Tensor, other: Tensor) -> float:
    """Of features [n, D] with n far below D: the roots of the eigenvalues of C1 C2 are the singular values of the
    centred features' products [n, n].
    """
    a, b = ((part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (one, other))
    shared = torch.linalg.svdvals(a @ b.T).sum()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return float(apart + a.square().sum() + b.square().sum() - 2 * shared)


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(
    sets: tuple[Path, Path],
    vae_file: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = (
        "reconstruction",
        sets[0],
        "--vae",
        vae_file,
        "--size",
        64,
        "--batch-size",
        4,
        "--posterior",
        "sample",
    )
    args = (*args, "--metrics", "psnr,ssim")
    whole = run(*args, "-o", "whole")
    real = _Work.columns

    def stopping(self: _Work, rows: range) -> Columns:
        if rows.start == 4:
            raise KeyboardInterrupt
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(_Work, "columns", stopping)
        assert cli.run(["eval", *map(str, args), "-o", "parts", "--device", "cpu"]) == 130
    assert "stopped at 4 of 6; the same command goes on from there" in capsys.readouterr().err
    assert run(*args, "-o", "parts")["results"] == whole["results"]
    # another posterior is another measurement
    other = [*map(str, args[:-4]), "--metrics", "psnr,ssim"]
    assert cli.run(["eval", *other, "-o", "parts", "--device", "cpu"]) == 3
    assert "was begun with other settings (posterior" in capsys.readouterr().err


def test_several_autoencoders_are_rows_of_one_table(
    sets: tuple[Path, Path], vae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "--vae",
        str(vae_file),
        "--vae",
        "bundled",
        "--size",
        "64",
        "--metrics",
        "psnr,ssim",
        "--limit",
        "3",
    ]
    assert cli.run(["eval", "reconstruction", str(sets[0]), *args, "-o", "a", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "small" in shown
    assert "sdxl-tiny-base" in shown
    assert "Table 3" in shown
    assert "24.7" in shown


def test_autoencoders_of_one_name_are_told_apart(
    sets: tuple[Path, Path], vae: Autoencoder, vae_file: Path, run: Run
) -> None:
    Path("other").mkdir()
    state = {name: tensor * 0.9 for name, tensor in vae.state_dict().items()}
    save_vae(Path("other") / vae_file.name, state, SMALL)
    args = ("reconstruction", sets[0], "--size", 32, "--metrics", "psnr", "--limit", 2, "-o", "a")
    files = (vae_file, Path("other") / vae_file.name)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    both = run(*args, "--vae", files[0], "--vae", files[1])
    assert [row["name"] for row in both["results"]] == [f"small ({digest[:10]})" for digest in hashes]
    one, other = (run(*args, "--vae", path) for path in files)
    assert one["settings"]["vae"] == [{"name": "small", "sha256": hashes[0]}]
    assert one["settings"]["dtype"] == "fp32"
    assert one["results"][0]["name"] == other["results"][0]["name"] == "small"
    assert len(list(Path("a").glob("results*.json"))) == 3


def test_the_autoencoder_computes_in_fp32_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that has bf16, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert _precision("auto", "cuda") == _precision("fp32", "cuda") == torch.float32
    assert _precision("bf16", "cuda") == torch.bfloat16


def test_what_a_metric_has_no_number_for_is_refused_before_any_work(
    sets: tuple[Path, Path],
    vae_file: Path,
    lpips_file: Path,
    inception_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alex = ("--lpips-net", "alex", "--lpips-weights", str(lpips_file))
    inception = ("--inception-weights", str(inception_file))
    for args, says in (
        (("--size", "8", "--metrics", "ssim"), "--size 8: ssim needs sides of 11 pixels"),
        (("--size", "56", "--metrics", "lpips", *alex), "--size 56: lpips needs sides of 63 pixels"),
        (("--size", "32", "--metrics", "rfid", "--limit", "1", *inception), "rFID needs at least two"),
    ):
        base = ["reconstruction", str(sets[0]), "--vae", str(vae_file), "--device", "cpu"]
        assert cli.run(["eval", *base, *args]) == 2
        assert says in capsys.readouterr().err
    assert not list(Path().glob("evaluations/*/*/rows-*"))


def test_sizes_that_do_not_fit_are_refused(
    sets: tuple[Path, Path], vae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["eval", "reconstruction", str(sets[0]), "--vae", str(vae_file), "--metrics", "psnr", "--size"]
    assert cli.run([*base, "60"]) == 2
    assert "has to be a multiple of 8" in capsys.readouterr().err
    assert cli.run([*base, "0"]) == 2


def test_lpips_that_is_missing_is_asked_for(
    sets: tuple[Path, Path], vae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.run(["eval", "reconstruction", str(sets[0]), "--vae", str(vae_file), "--metrics", "lpips"]) == 6
    )
    assert "vgg16-397923af.pth" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_autoencoder_that_gives_nan_has_no_score(
    sets: tuple[Path, Path], vae: Autoencoder, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    state["decoder.conv_out.bias"].fill_(value)
    save_vae(Path("broken.safetensors"), state, SMALL)
    args = ["--vae", "broken.safetensors", "--size", "32", "--metrics", "psnr", "-o", "a", "--device", "cpu"]
    assert cli.run(["eval", "reconstruction", str(sets[0]), *args]) == 4
    said = capsys.readouterr().err
    assert "--vae broken makes NaN or infinity of 000.png" in said
    assert "use --vae-dtype fp32" in said
    assert not Path("a/results.json").exists()
