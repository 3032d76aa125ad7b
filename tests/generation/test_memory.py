"""Fitting in memory: what is loaded when, tiles and their seams, and what happens when there is too little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdxl_cli import cli
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model
from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.errors import MemoryLimitError
from sdxl_cli.generation import autoencode, rescue, residency
from sdxl_cli.generation.autoencode import decode, encode, to_image
from sdxl_cli.generation.memory import estimate, part_bytes
from sdxl_cli.generation.picture import read_pixels, read_texts
from sdxl_cli.generation.pipeline import Models, generate
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.streaming import streamed_bytes, units
from sdxl_cli.generation.tiling import OVERLAP, decoded_in_tiles, encoded_in_tiles, spans
from sdxl_cli.generation.weights import FileWeights
from sdxl_cli.model import vae_strips
from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder
from tests.generation.test_pipeline import REQUEST, Silent, made, weights
from tests.model.peers import relative

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_what_is_loaded_is_told_from_tables_of_contents(models: dict[str, Path]) -> None:
    """Against the parameters of the networks themselves; of a pruned vocabulary the whole one is loaded."""
    for name in ("base", "refiner", "pruned"):
        files = locate(str(models[name]), "model")
        for part, size in part_bytes(files, torch.float16, FP32).items():
            loaded = load_model(files, (part,), dtype=torch.float16, vae_dtype=FP32)
            held = sum(p.numel() * p.itemsize for p in loaded.parameters())
            assert size == pytest.approx(held, rel=1e-3), (name, part)


def test_the_table_names_each_stage_and_its_weights(models: dict[str, Path]) -> None:
    files = {role: locate(str(models[role]), "model") for role in ("base", "refiner")}
    sizes = {role: part_bytes(one, FP32, FP32) for role, one in files.items()}
    table = residency.stages("med", files, FP32, FP32)
    assert [(stage.name, stage.bytes) for stage in table] == [
        ("base text encoders", sizes["base"]["text"]),
        ("refiner text encoders", sizes["refiner"]["text"]),
        ("base U-Net", sizes["base"]["unet"]),
        ("refiner U-Net", sizes["refiner"]["unet"]),
        ("base autoencoder", sizes["base"]["vae"]),
    ]
    low = residency.stages("low", files, FP32, FP32)
    assert low[2].bytes == streamed_bytes(files["base"].config.unet, FP32) < table[2].bytes
    high = residency.stages("high", files, FP32, FP32)
    assert {stage.bytes for stage in high} == {sum(sum(parts.values()) for parts in sizes.values())}


@pytest.mark.parametrize(
    ("share", "chosen"), [(100.0, "high"), (1.5, "med"), (0.5, "low")], ids=["plenty", "some", "little"]
)
def test_auto_looks_at_what_is_free(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, share: float, chosen: str
) -> None:
    """``share`` of what the largest part takes is free."""
    files = locate(str(models["base"]))
    largest = max(part_bytes(files, FP32, FP32).values())
    monkeypatch.setattr(residency, "free_bytes", lambda device: int(share * largest))
    monkeypatch.setattr(residency, "SMALL", int(share * largest / 2))
    assert residency.choose("auto", [files], CPU, FP32, FP32) == chosen
    assert residency.choose("med", [files], CPU, FP32, FP32) == "med"


def test_free_memory_is_what_linux_says(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert residency.free_bytes(CPU, tmp_path / "meminfo") == 2 << 20
    assert residency.free_bytes(CPU, tmp_path / "gone") is None


@pytest.mark.parametrize("vram", ["high", "med", "low"])
def test_what_stays_loaded_never_changes_a_picture(
    models: dict[str, Path], vram: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-m", str(models["base"]), "--refiner", str(models["refiner"]), "--steps", "3", "--seed", "5"]
    code = cli.run(["generate", "a red guitar", *flags, "--scheduler", "sgm", "--vram", vram, "-o", "a.png"])
    assert code == 0
    assert f"--vram {vram}, " in capsys.readouterr().err
    request = replace(REQUEST, sampler="dpmpp_2m", steps=3)
    expected = made(request, models["base"], models["refiner"])[0].pixels
    assert np.array_equal(read_pixels(Path("a.png")), expected)


def test_streamed_blocks_come_and_go(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored in half precision and computed in single: only one block at a time is of the second kind."""
    half = load_model(locate(str(models["base"])), dtype=torch.float16, vae_dtype=FP32)
    save_model(Path("half.safetensors"), half, half.config)
    files = locate("half.safetensors")
    low = FileWeights(files, device=CPU, dtype=FP32, vae_dtype=FP32, streams=True)
    plain = FileWeights(files, device=CPU, dtype=FP32, vae_dtype=FP32)
    unet, expected = low.unet(), plain.unet()
    held = []

    def look(module: nn.Module, args: object, output: object) -> None:
        held.append(sum(p.numel() * 4 for p in unet.parameters() if p.dtype == FP32))

    for module in units(unet):
        module.register_forward_hook(look, prepend=True)
    x, y = torch.randn(1, 4, 8, 8), torch.randn(1, files.config.unet.adm_in_channels)
    context, t = torch.randn(1, 7, files.config.unet.context_dim), torch.tensor([500])
    prepared = [network.prepare(context, y) for network in (unet, expected)]
    shifts = [n.shifts(t[None], p)[0] for n, p in zip((unet, expected), prepared, strict=True)]
    assert torch.equal(unet.step(x, shifts[0], prepared[0]), expected.step(x, shifts[1], prepared[1]))
    assert max(held) == streamed_bytes(files.config.unet, FP32)
    assert {p.dtype for parameters in units(unet).values() for p in parameters} == {torch.float16}
    sizes = {"size": (64, 64), "batch": 2, "tokens": 77, "decodes": False}
    assert estimate(files, low, **sizes).weights["unet"] == max(held)  # type: ignore[arg-type]
    assert torch.equal(unet(x, t, context, y), expected(x, t, context, y))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 128, 250])
def test_tiles_cover_a_side_and_overlap(length: int) -> None:
    found = spans(length, 64)
    assert found[0][0] == 0
    assert found[-1][1] == length
    for (start, end), (following, _) in zip(found, found[1:], strict=False):
        assert start < following <= end - 64 * OVERLAP + 1
    assert all(end - start == min(64, length) for start, end in found)


def test_tiles_of_something_without_surroundings_are_exact() -> None:
    """What looks at one latent at a time must come out as if there were no tiles."""
    kernel = torch.randn(3, 4, 1, 1)
    x = torch.randn(1, 4, 50, 37)

    def up(z: Tensor) -> Tensor:
        return nn.functional.interpolate(nn.functional.conv2d(z, kernel), scale_factor=8)

    def down(image: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image, 8)

    torch.testing.assert_close(decoded_in_tiles(up, x, factor=8, tile=16), up(x))
    torch.testing.assert_close(encoded_in_tiles(down, up(x), factor=8, tile=16), down(up(x)))


def test_the_bundled_autoencoder_shows_no_seam_in_tiles() -> None:
    """Steps across tile borders are no larger than elsewhere, on a smooth picture where an edge would be seen."""
    vae = FileWeights(locate("bundled"), device=CPU, dtype=FP32, vae_dtype=FP32)
    rows, columns = np.mgrid[0:256, 0:384]
    colours = [128 + 90 * np.sin(rows / 70 + k) * np.cos(columns / 90 - k) for k in range(3)]
    pixels = np.stack(colours, axis=2).astype(np.uint8)
    latent = encode(to_image(pixels), vae).mode() * vae.config.vae.scale_factor
    whole, tiled = (decode(latent, vae, tile=tile).astype(float) for tile in (None, 16))
    difference = np.abs(whole - tiled)
    edges = sorted({edge * 8 for span in spans(48, 16) for edge in span} - {0, 384})
    steps = np.abs(np.diff(tiled - whole, axis=1)).mean(axis=(0, 2))
    seam = max(steps[edge - 1] for edge in edges)
    print(
        f"tiles of 128 pixels: mean difference {difference.mean():.2f}, step at a border {seam:.2f} levels, "
        f"elsewhere {steps.mean():.2f}"
    )
    assert difference.mean() < 10
    assert seam < 2 * steps.mean() + 0.1
    hard = np.concatenate([decode(latent[:, :, :, s : s + 16], vae) for s in (0, 16, 32)], axis=1)
    hard_steps = np.abs(np.diff(hard - whole, axis=1)).mean(axis=(0, 2))
    assert max(hard_steps[127], hard_steps[255]) > 3 * seam, "laid side by side there is a seam"


def fails(monkeypatch: pytest.MonkeyPatch, largest: int, kind: str = "decode") -> None:
    """Let the autoencoder run out of memory for more than ``largest`` latents or pixels a side."""
    function = getattr(vae_strips, kind)

    def limited(vae: Autoencoder, values: Tensor, *, winograd: bool) -> Any:
        if values.shape[3] > largest:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return function(vae, values, winograd=winograd)

    monkeypatch.setattr(vae_strips, kind, limited)


Sdxl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sdxl(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Sdxl:
    def run(*args: object) -> tuple[int, str, str]:
        code = cli.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def asked(models: dict[str, Path], *more: object) -> tuple[object, ...]:
    return (
        "generate",
        "a red guitar",
        "-m",
        models["base"],
        "--steps",
        1,
        "--size",
        "192x256",
        "--seed",
        5,
        *more,
    )


def test_out_of_memory_saves_the_latents_and_goes_on_in_tiles(
    models: dict[str, Path], sdxl: Sdxl, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fails(patch, 16)
        code, out, err = sdxl(*asked(models, "-o", "out", "--num-images", 2))
    assert code == 0
    for seed in (5, 6):
        words = f"out of memory while decoding; the latents are saved as out/sdxl-{seed}.latents.safetensors"
        assert err.count(words) == 1
    assert "for sdxl decode; going on in tiles" in err
    saved = sorted(path.name for path in Path("out").glob("*.safetensors"))
    assert saved == ["sdxl-5.latents.safetensors", "sdxl-6.latents.safetensors"]
    tiled = Path(out.split()[0])
    assert '"vae_tile": "16"' in read_texts(tiled).record
    code, out, _ = sdxl("decode", "out/sdxl-5.latents.safetensors", "-o", "later.png")
    assert (code, out) == (0, "later.png\n")
    sdxl(*asked(models, "-o", "whole.png"))
    assert Path("later.png").read_bytes() == Path("whole.png").read_bytes()
    assert not np.array_equal(read_pixels(tiled), read_pixels(Path("whole.png")))


@pytest.mark.parametrize(
    ("first", "side", "tried"),
    [(None, 160, [None, 64, 32, 16]), (None, 32, [None, 16]), (64, 160, [64, 32, 16]), (None, 8, [None, 16])],
)
def test_tiles_become_smaller_until_they_fit(first: int | None, side: int, tried: list[int | None]) -> None:
    seen: list[int | None] = []

    def work(tile: int | None) -> str:
        seen.append(tile)
        if tile != 16:
            raise MemoryError
        return "done"

    freed, report = [], Silent()

    def free() -> str:
        freed.append(True)
        return ""

    found = rescue.with_less(work, "x", report, side=side, tile=first, before_retry=free)
    assert (found, seen) == (("done", 16), tried)
    assert len(freed) == len(report.said) == len(tried) - 1


def test_when_nothing_helps_the_exit_code_is_5_and_nothing_is_lost(
    models: dict[str, Path], sdxl: Sdxl, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, 8)
    code, out, err = sdxl(*asked(models, "--quiet", "-o", "one.png"))
    assert (code, out) == (5, "")
    last = err.splitlines()[-1]
    assert last.startswith("sdxl: out of memory while decoding, in tiles of 16 latents too")
    assert "saved as one-5.latents.safetensors, for sdxl decode" in last
    assert Path("one-5.latents.safetensors").is_file()


def test_encoding_too_goes_on_in_tiles(
    models: dict[str, Path], sdxl: Sdxl, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (192, 256), "teal").save("photo.png")
    fails(monkeypatch, 128, "encode")
    code, _, err = sdxl(*asked(models, "-i", "photo.png", "--strength", 1, "-o", "one.png"))
    assert code == 0
    assert "out of memory while encoding; going on in tiles" in err


def test_strips_come_before_tiles(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without room for the whole decodes in strips, which give the same; no other error is taken for it."""
    base, latent = weights(models["base"]), torch.randn(1, 4, 8, 8)
    monkeypatch.setattr(autoencode, "in_strips", lambda *_: False)
    whole = autoencode.decoded(latent, base)

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Autoencoder, "decode", full)
    monkeypatch.setattr(Autoencoder, "encode", full)
    assert relative(autoencode.decoded(latent, base), whole) < 5e-5
    assert autoencode.encode(torch.zeros(1, 3, 64, 64), base).mean.isfinite().all()
    monkeypatch.setattr(Autoencoder, "decode", lambda *_: latent.view(7))
    with pytest.raises(RuntimeError, match="shape"):
        autoencode.decoded(latent, base)


def test_a_full_device_while_denoising_is_told_with_advice(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(UNet, "step", full)
    base = weights(models["base"])
    with pytest.raises(MemoryLimitError, match="out of memory making 64x64; try --vram low, or a smaller"):
        list(generate(plan_generation(REQUEST, base.config), Models(base=base), Silent()))


def test_other_errors_are_not_taken_for_missing_memory(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object, **settings: object) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(vae_strips, "decode", wrong)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        made(REQUEST, models["base"])


def test_too_little_memory_of_its_own_is_seen_before(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, report = weights(models["base"]), Silent()
    assert rescue.first_tile((256, 256), base, report, tiling=False) is None
    monkeypatch.setattr(rescue, "free_bytes", lambda device: 1 << 20)
    assert rescue.first_tile((256, 256), base, report, tiling=False) == 64
    assert "works in tiles" in report.said[0]


@pytest.mark.parametrize("content", ["picture", "model"])
def test_decode_takes_latents_only(models: dict[str, Path], sdxl: Sdxl, content: str) -> None:
    Path("text.safetensors").write_text("no tensors")
    path = models["base"] if content == "model" else "text.safetensors"
    code, _, err = sdxl("decode", path)
    assert code == 3
    assert len(err.splitlines()) == 1
