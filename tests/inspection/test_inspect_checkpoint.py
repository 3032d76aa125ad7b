"""What inspect-checkpoint says, against files whose faults are known, and hashes against their definitions."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sdxl_cli import cli
from sdxl_cli.checkpoint.finite import count_non_finite
from sdxl_cli.checkpoint.write import save_model, save_tensors
from sdxl_cli.model.config import TINY, TINY_REFINER, ModelConfig
from sdxl_cli.model.sdxl import SDXL

Capture = pytest.CaptureFixture[str]
UNET = "model.diffusion_model."
OUT = f"{UNET}out.2.bias"
KERNEL = f"{UNET}middle_block.0.in_layers.2.weight"


def small(config: ModelConfig) -> ModelConfig:
    unet = replace(config.unet, model_channels=16, num_head_channels=16, norm_groups=4)
    towers = {
        "clip_l": replace(config.clip_l, vocab_size=60) if config.clip_l else None,
        "big_g": replace(config.big_g, vocab_size=60),
    }
    return replace(config, unet=unet, **towers)  # type: ignore[arg-type]


BASE, REFINER = small(TINY), small(TINY_REFINER)


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.half() for name, tensor in SDXL(BASE).state_dict().items()}


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


def report(capsys: Capture, path: object) -> tuple[int, dict[str, Any], str]:
    code = cli.run(["inspect-checkpoint", str(path), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


def test_a_sound_base(state: dict[str, Tensor], capsys: Capture) -> None:
    save_model("a.safetensors", state, BASE, metadata={"modelspec.author": "me"}, prediction="v")
    code, found, err = report(capsys, "a.safetensors")
    assert (code, err) == (0, "")
    assert (found["kind"], found["layout"], found["prediction"]) == ("base", "single file", "v")
    assert found["missing"] == found["unexpected"] == found["mis_shaped"] == found["not_finite"] == []
    expected = {
        "U-Net": "model.diffusion_model.",
        "VAE": "first_stage_model.",
        "CLIP-L": "conditioner.embedders.0.",
        "bigG": "conditioner.embedders.1.",
    }
    for part in found["parts"]:
        prefix = expected.pop(part["name"])
        count = sum(t.numel() for n, t in state.items() if n.startswith(prefix) and "logit_scale" not in n)
        assert part["parameters"] == part["expected"] == count
    assert not expected
    elements = sum(tensor.numel() for tensor in state.values())
    assert found["dtypes"] == {"F16": elements, "I64": 77}
    assert found["metadata"]["modelspec.author"] == "me"


def test_a_refiner_and_an_inpainting_model(capsys: Capture) -> None:
    save_model("r.safetensors", SDXL(REFINER), REFINER)
    code, found, _ = report(capsys, "r.safetensors")
    assert (code, found["kind"]) == (0, "refiner")
    assert [part["name"] for part in found["parts"]] == ["U-Net", "VAE", "bigG"]
    config = replace(BASE, unet=replace(BASE.unet, in_channels=9))
    save_model("i.safetensors", SDXL(config), config)
    code, found, _ = report(capsys, "i.safetensors")
    assert (code, found["kind"]) == (0, "inpaint")


def test_the_hashes_are_those_other_programs_show(state: dict[str, Tensor], capsys: Capture) -> None:
    path = Path("a.safetensors")
    save_model(path, state, BASE)
    data = path.read_bytes()
    assert len(data) > 0x110000
    file = report(capsys, path)[1]["files"][0]
    assert file["sha256"] == hashlib.sha256(data).hexdigest()
    assert file["autov2"] == file["sha256"][:10]
    # A1111's modules/hashes.py and sd_models.py: model_hash, addnet_hash_safetensors
    assert file["autov1"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    (length,) = struct.unpack("<Q", data[:8])
    assert file["autov3"] == hashlib.sha256(data[8 + length :]).hexdigest()[:12]
    assert file["stated_hash_fits"] is True
    assert file["released"] is None


def test_metadata_that_states_another_hash_is_told_of(state: dict[str, Tensor], capsys: Capture) -> None:
    safetensors.torch.save_file(
        {"a": torch.ones(1)}, "x.safetensors", {"modelspec.hash_sha256": f"0x{'12' * 32}"}
    )
    code, found, err = report(capsys, "x.safetensors")
    assert code == 0
    assert found["files"][0]["stated_hash_fits"] is False
    assert "states another hash of its tensors" in err


def test_a_released_file_is_known_by_its_hash(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_cli.checkpoint.released import RELEASED, Released

    save_tensors("x.safetensors", {"a": torch.ones(1)})
    digest = hashlib.sha256(Path("x.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(RELEASED, "vae", Released("a/b", "sdxl_vae.safetensors", digest))
    assert report(capsys, "x.safetensors")[1]["files"][0]["released"] == "sdxl_vae"


def test_every_fault_is_listed_and_ends_in_an_exit_code(state: dict[str, Tensor], capsys: Capture) -> None:
    changed = {name: tensor for name, tensor in state.items() if name != OUT}
    changed[f"{UNET}time_embed.0.bias"] = torch.zeros(3)
    changed[f"{UNET}extra.weight"] = torch.zeros(2)
    changed["denoiser.sigmas"] = torch.zeros(4)
    save_model("bad.safetensors", changed, BASE)
    code, found, err = report(capsys, "bad.safetensors")
    assert code == 3
    assert found["missing"] == [OUT]
    assert found["unexpected"] == [f"{UNET}extra.weight"]
    assert found["mis_shaped"] == [[f"{UNET}time_embed.0.bias", [3], [64]]]
    assert found["ignored"] == ["denoiser.sigmas"]
    assert f"1 missing: {OUT}; 1 mis-shaped: {UNET}time_embed.0.bias; 1 unexpected: {UNET}extra.weight" in err


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_nan_and_infinity_are_counted_where_they_are(
    form: str, state: dict[str, Tensor], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = dict(state)
    broken[KERNEL] = state[KERNEL].clone()
    broken[KERNEL].view(-1)[:5] = torch.tensor([float("nan"), float("inf"), float("-inf"), float("nan"), 1.0])
    path = f"nan.{form}"
    if form == "ckpt":
        monkeypatch.setattr("sdxl_cli.checkpoint.identify.BASE", BASE)
        torch.save({"state_dict": broken}, path)
    else:
        save_model(path, broken, BASE)
    code, found, err = report(capsys, path)
    assert code == 4
    assert found["not_finite"] == [{"name": KERNEL, "nan": 2, "infinite": 2}]
    assert f"1 tensors have NaN or infinity, such as {KERNEL} (2 NaN, 2 infinite)" in err


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_non_finite_numbers_by_their_bits(dtype: torch.dtype) -> None:
    """Every pattern of 16 bits or fewer, and the edges of the wide ones, against torch's own isnan and isinf."""
    if dtype.itemsize <= 2:
        bits = torch.arange(256 ** min(dtype.itemsize, 2))
        integers = bits.to(torch.uint8) if dtype.itemsize == 1 else bits.to(torch.int32).to(torch.int16)
        numbers = integers.view(dtype)
    else:
        top = torch.finfo(dtype)
        values = [0.0, -0.0, 1.0, top.max, -top.max, top.tiny, float("nan"), float("inf"), float("-inf")]
        numbers = torch.tensor(values, dtype=dtype)
    wide = numbers.double()
    assert count_non_finite(numbers) == (int(wide.isnan().sum()), int(wide.isinf().sum()))
    assert int(wide.isnan().sum()) > 0
    assert count_non_finite(torch.arange(5)) == (0, 0)


def test_parts_that_never_arrived_are_suspicious(state: dict[str, Tensor], capsys: Capture) -> None:
    save_model("holes.safetensors", state | {KERNEL: torch.zeros_like(state[KERNEL])}, BASE)
    code, found, err = report(capsys, "holes.safetensors")
    assert code == 0
    assert found["all_zero"] == [KERNEL]
    assert cli.run(["inspect-checkpoint", "holes.safetensors"]) == 0
    assert f"1 matrices are all zero, as if never downloaded: {KERNEL}" in capsys.readouterr().err + err


def test_a_folder_has_the_hashes_of_its_files(state: dict[str, Tensor], capsys: Capture) -> None:
    save_model("a.safetensors", state, BASE)
    assert cli.run(["convert", "a.safetensors", "folder", "--quiet"]) == 0
    capsys.readouterr()
    code, found, _ = report(capsys, "folder")
    assert (code, found["kind"], found["layout"]) == (0, "base", "diffusers folder")
    assert len(found["files"]) == 4
    for file in found["files"]:
        assert file["sha256"] == hashlib.sha256(Path(file["path"]).read_bytes()).hexdigest()
    assert all(part["parameters"] == part["expected"] for part in found["parts"])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"lora_unet_x_attn2_to_k.lora_down.weight": torch.ones(8, 2048)}, "a LoRA (SDXL, rank 8)"),
        ({"cond_stage_model.transformer.x": torch.ones(1)}, "a Stable Diffusion 1 model"),
        ({"double_blocks.0.img_attn.qkv.weight": torch.ones(1)}, "a Flux model"),
        ({"some.thing": torch.ones(1)}, "no model this program knows"),
    ],
)
def test_other_things_are_named_and_no_fault(tensors: dict[str, Tensor], says: str, capsys: Capture) -> None:
    save_tensors("x.safetensors", tensors)
    code, found, _ = report(capsys, "x.safetensors")
    assert code == 0
    assert says in found["label"]
    assert found["parts"] == []


@pytest.mark.parametrize("form", ["prefixed", "bare"])
def test_a_unet_alone(
    form: str, state: dict[str, Tensor], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (
        "sdxl_cli.checkpoint.identify",
        "sdxl_cli.inspection.checkpoint",
        "sdxl_cli.checkpoint.locate",
    ):
        monkeypatch.setattr(f"{module}.BASE", BASE)
    unet = {name: tensor for name, tensor in state.items() if name.startswith(UNET)}
    if form == "bare":
        unet = {name.removeprefix(UNET): tensor for name, tensor in unet.items()}
    save_tensors("unet.safetensors", unet)
    code, found, _ = report(capsys, "unet.safetensors")
    assert (code, found["kind"]) == (0, "unet")
    (part,) = found["parts"]
    assert part["parameters"] == part["expected"] == sum(tensor.numel() for tensor in unet.values())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], r"bad.safetensors: 1\.\d of 2\.\d MB are here"),
        (lambda data: data[:5000], r"ends inside its table of contents \(\d\.\d kB of \d+\.\d kB are here\)"),
        (lambda data: data + b"xx", "2 bytes longer than its contents"),
        (lambda data: data[:9] + b"\x00" * 40 + data[49:], "damaged table of contents of .* kB"),
        (lambda data: data.replace(b'"F16"', b'"F32"', 1), r"has \d+ bytes, its shape and dtype want \d+"),
        (lambda data: b"", r"is empty \(0 bytes\)"),
    ],
)
def test_damaged_files_are_one_line_with_sizes(
    damage: Callable[[bytes], bytes], says: str, state: dict[str, Tensor], capsys: Capture
) -> None:
    import re

    few = {name: tensor for name, tensor in state.items() if name.startswith("first_stage_model.")}
    save_tensors("good.safetensors", few)
    Path("bad.safetensors").write_bytes(damage(Path("good.safetensors").read_bytes()))
    code, found, err = report(capsys, "bad.safetensors")
    assert (code, found) == (3, {})
    assert re.search(says, err), err
    assert err.count("\n") == 1


def test_tensors_that_share_bytes_are_damage(capsys: Capture) -> None:
    table = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    text = json.dumps(table).encode()
    Path("x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 12)
    code, _, err = report(capsys, "x.safetensors")
    assert code == 3
    assert "b begins at byte" in err


def test_the_page_for_people(capsys: Capture) -> None:
    assert cli.run(["inspect-checkpoint", "bundled"]) == 0
    page = capsys.readouterr().out
    for expected in (
        "an SDXL base model",
        "U-Net",
        "CLIP-L",
        "predicts: v",
        "AutoV2",
        "sound: every tensor",
    ):
        assert expected in page
    assert "vocabulary: embeddings of" in page
