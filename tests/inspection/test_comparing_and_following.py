"""Two autoencoders, two caches, a generation step by step, and the report in HTML."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from sdxl_cli import cli
from sdxl_cli.checkpoint.write import save_vae
from sdxl_cli.data.loader import to_tensor
from sdxl_cli.errors import UsageError
from sdxl_cli.generation import device
from sdxl_cli.inspection import audit, following
from sdxl_cli.inspection.latents import Findings, InspectRequest, inspect_latents
from sdxl_cli.model.vae import Autoencoder
from tests.inspection.conftest import SMALL

Write = Callable[..., Path]


def look(*inputs: Path, **options: Any) -> Findings:
    return inspect_latents(InspectRequest(inputs=inputs, **options))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_vae(path, Autoencoder(SMALL), SMALL)
    return path


def image(path: Path) -> torch.Tensor:
    return to_tensor(np.array(Image.open(path).convert("RGB")))


def test_psnr_and_ssim_of_a_reconstruction_are_torchmetrics(
    pictures: Path, vae: Autoencoder, vae_file: Path
) -> None:
    (found,) = look(pictures / "b.png", vae=str(vae_file)).report.reconstructions
    before = image(pictures / "b.png")[None]
    with torch.no_grad():
        after = vae.decode(vae.encode(before).mode()).clamp(-1, 1)
    pair = after.double() + 1, before.double() + 1
    ssim = structural_similarity_index_measure(*pair, data_range=2.0)
    assert found.ssim == pytest.approx(float(ssim), abs=1e-6)
    assert found.psnr == pytest.approx(float(peak_signal_noise_ratio(*pair, data_range=2.0)), abs=1e-4)


def test_two_autoencoders_are_compared_on_the_same_pixels(
    pictures: Path, vae: Autoencoder, vae_file: Path, other: Path
) -> None:
    found = look(pictures, vae=str(vae_file), compare_vae=str(other))
    report, beside = found.report, found.report.comparison
    assert beside is not None
    alone = look(pictures, vae=str(other)).report
    assert (beside.name, beside.inspected, beside.pairs) == ("other", 3, 3)
    assert beside.together == alone.together
    assert beside.quality == alone.quality
    ours = {r.name: r.psnr for r in report.reconstructions}
    gains = [r.psnr - ours[r.name] for r in alone.reconstructions]
    assert beside.better == sum(gain >= 0.01 for gain in gains)
    assert beside.worse == sum(gain <= -0.01 for gain in gains)
    assert {sheet.name for sheet in found.sheets} == {"reconstructions", "versus", "channels"}


def test_an_autoencoder_beside_itself_agrees_with_itself(pictures: Path, vae_file: Path) -> None:
    beside = look(pictures, vae=str(vae_file), compare_vae=str(vae_file)).report.comparison
    assert beside is not None
    assert (beside.rms_difference, beside.better, beside.worse) == (0.0, 0, 0)
    assert beside.channel_correlation == pytest.approx((1.0,) * 4)
    assert beside.frechet == pytest.approx(0, abs=1e-9)


def test_latents_of_the_same_name_are_compared_number_by_number(latents: Write) -> None:
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    first, second = latents("one", a=x[0], b=x[1], c=x[2]), latents("two", b=x[1] + 3, c=x[2], d=noise[0])
    beside = look(first, compare=second, scale_factor=1.0).report.comparison
    assert beside is not None
    assert (beside.inspected, beside.pairs) == (3, 2)
    assert beside.rms_difference == pytest.approx(math.sqrt(9 / 2), rel=1e-6)
    both = [torch.stack(part).transpose(0, 1).flatten(1) for part in ([x[1], x[2]], [x[1] + 3, x[2]])]
    expected = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*both, strict=True)]
    assert beside.channel_correlation == pytest.approx(expected, rel=1e-5)


def test_latents_are_not_compared_through_two_autoencoders(
    latents: Write, vae_file: Path, other: Path
) -> None:
    with pytest.raises(UsageError, match="needs pictures"):
        look(latents(x=torch.zeros(1, 4, 4, 4)), vae=str(vae_file), compare_vae=str(other))


def test_latents_are_decoded_by_the_autoencoder_that_was_named(
    latents: Write, vae: Autoencoder, vae_file: Path
) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = look(latents(x=x), vae=str(vae_file))
    sheet = next(sheet for sheet in found.sheets if sheet.name == "decoded")
    with torch.no_grad():
        expected = ((vae.decode(x[:1])[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    shown = np.asarray(sheet.strips[0].cells[0])[::4, ::4]  # 64 pixels, four times as large
    np.testing.assert_array_equal(shown, expected.permute(1, 2, 0).numpy())
    assert found.report.colours is not None
    assert found.report.colours.positions == 128


def run(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert cli.run(["inspect-latents", *args, "--json", "-q"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def followed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> dict[str, Any]:
    flags = ["--model", "bundled", "--steps", "4", "--seed", "7", "--size", "64x64", "--fp16-audit", "all"]
    return run(capsys, "--prompt", "a red apple", *flags, "-o", str(tmp_path / "out"))


def test_a_generation_is_followed_step_by_step(followed: dict[str, Any], tmp_path: Path) -> None:
    steps = followed["followed"]["steps"]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert [s["timestep"] for s in steps] == sorted((s["timestep"] for s in steps), reverse=True)
    first = steps[0]
    # the first x is noise of the model's largest level
    assert first["x"]["std"] == pytest.approx(first["expected_std"], rel=0.1)
    assert first["expected_std"] == pytest.approx(math.sqrt(1 + 14.6146**2), rel=1e-4)
    assert first["change"] is None
    assert all(s["change"] > 0 for s in steps[1:])
    # x = denoised + sigma · eps, for the means of every channel
    for s in steps:
        for x, denoised, eps in zip(*(s[k]["channel_means"] for k in ("x", "denoised", "eps")), strict=True):
            assert x == pytest.approx(denoised + s["sigma"] * eps, abs=1e-4)
    assert {a["network"] for a in followed["audits"]} == {"U-Net", "autoencoder"}
    assert all(a["layers"] and not a["overflowing"] for a in followed["audits"])
    assert [Path(f).name for f in followed["files"]] == [
        "steps.png",
        "decoded.png",
        "channels.png",
        "report.html",
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["request"]["seed"] == 7


def test_what_is_followed_is_the_picture_that_generate_makes(
    followed: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--model", "bundled", "--steps", "4", "--seed", "7", "--size", "64x64", "--dtype", "fp32", "-q"]
    assert cli.run(["generate", "a red apple", *flags, "-o", str(tmp_path / "made.png")]) == 0
    made = np.asarray(Image.open(tmp_path / "made.png"))
    sheet = np.asarray(Image.open(tmp_path / "out" / "steps.png"))
    tall = np.repeat(np.repeat(made, 4, axis=0), 4, axis=1)
    rows = [y for y in range(len(sheet) - 255) if (sheet[y, 12 : 12 + 256] == tall[0]).all()]
    assert any((sheet[y : y + 256, 12 : 12 + 256] == tall).all() for y in rows)


def test_a_unet_is_watched_on_noised_latents_of_the_pictures(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(capsys, str(pictures / "b.png"), "--model", "bundled", "--fp16-audit", "unet")
    (audit,) = report["audits"]
    assert (audit["network"], audit["runs"]) == ("U-Net", 6)
    assert {layer["at"] for layer in audit["layers"]} <= {f"t={t}" for t in (999, 799, 599, 400, 200, 0)}
    assert {"input_blocks.0.0", "out.2"} <= {layer["name"] for layer in audit["layers"]}


@pytest.mark.parametrize("inputs", [["b.png"], ["--prompt", "x", "--steps", "1", "--size", "64x64"]])
def test_an_audit_is_in_fp32_where_generation_would_not_be(
    inputs: list[str], pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose processor has bf16."""
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    monkeypatch.chdir(pictures)
    seen = set()

    def noting(unet: torch.nn.Module, *rest: Any) -> Any:
        seen.update(parameter.dtype for parameter in unet.parameters())
        return audit.audit_unet(unet, *rest)

    monkeypatch.setattr(following, "audit_unet", noting)
    run(capsys, *inputs, "--model", "bundled", "--fp16-audit", "unet")
    assert seen == {torch.float32}


class Addresses(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        assert tag not in ("script", "link", "iframe", "object")


def test_the_report_is_one_file_and_asks_for_nothing(pictures: Path, vae_file: Path, tmp_path: Path) -> None:
    args = [str(pictures), "--vae", str(vae_file), "--fp16-audit", "vae"]
    assert cli.run(["inspect-latents", *args, "--report", str(tmp_path / "r.html"), "-q"]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Addresses()
    page.feed(text)
    assert page.found
    assert all(address.startswith("data:image/") for address in page.found)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)
    assert "prefers-color-scheme: dark" in text
    for said in ("a.png", "PSNR", "std x scale", "Colours as a linear map", "decoder.up.0.block.1"):
        assert said in text, said
    assert text.count("<polyline") == 4  # a histogram for every channel
    assert cli.run(["inspect-latents", *args, "--report", str(tmp_path / "r.html"), "-q"]) == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "give pictures or latents"),
        (["a.png", "--prompt", "x"], "not both"),
        (["a.png", "--steps", "3"], "--steps: says something about --prompt only"),
        (["--prompt", "x", "--scaled"], "--scaled: says something about pictures or latents only"),
        (["a.png", "--fp16-audit", "unets"], "did you mean unet"),
        (
            ["a.png", "--fp16-audit", "vae", "--dtype", "fp16"],
            "--dtype fp16: an audit runs the networks in fp32",
        ),
        (["a.png", "--scale-factor", "0"], "--scale-factor 0: has to be above 0"),
        (["a.png", "--scale-factor", "-1"], "--scale-factor -1: has to be above 0"),
        (["a.png", "--scale-factor", "nan"], "--scale-factor nan: has to be above 0"),
        (["a.png", "--lpips", "vgg16"], "did you mean vgg"),
        (["a.png", "--compare-vae", "x", "--compare", "y"], "one at a time"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect-latents", *args]) == 2
    assert says in capsys.readouterr().err


def test_lpips_is_measured_with_its_weights_and_asked_for_without(
    pictures: Path,
    vae_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sdxl_cli.metrics.lpips import LPIPS

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    args = ["inspect-latents", str(pictures / "b.png"), "--vae", str(vae_file), "--lpips", "alex"]
    assert cli.run(args) == 6
    assert "torchvision's AlexNet is not here" in capsys.readouterr().err
    torch.manual_seed(0)
    model = LPIPS("alex")
    named = {
        (
            f"lin{key.split('.')[1]}.model.1.weight" if key.startswith("heads.") else f"features.{key[6:]}"
        ): value
        for key, value in model.state_dict().items()
    }
    torch.save(named, tmp_path / "alex.pth")
    assert cli.run([*args, "--lpips-weights", str(tmp_path / "alex.pth"), "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quality"]["lpips"] == report["reconstructions"][0]["lpips"] > 0
    # too small for the network: not measured, and no reason to stop
    small = [str(pictures / "a.png"), *args[2:], "--lpips-weights", str(tmp_path / "alex.pth")]
    assert cli.run(["inspect-latents", *small, "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["quality"]["lpips"] is None
