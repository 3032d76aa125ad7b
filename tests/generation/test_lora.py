"""``--lora`` and ``<lora:…>`` as people use them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_cli import cli
from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.lora import LoraUse, find_lora, take_tags
from sdxl_cli.generation.picture import read_pixels, read_texts
from sdxl_cli.generation.request import GenerateRequest
from tests.generation.conftest import BASE, REFINER


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def path(self) -> Path:
        return Path(self.out.splitlines()[0])


Generate = Callable[..., Result]
CONTEXT, DEEPEST = BASE.unet.context_dim, BASE.unet.model_channels * BASE.unet.channel_mult[-1]
UNET, TEXT = "middle_block.1.transformer_blocks.0.attn2.to_v", "encoder.layers.1.mlp.fc1"


@pytest.fixture
def generate(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Generate:
    def run(*args: object) -> Result:
        command = ["generate", "-m", models["base"], "--steps", 2, "--seed", 5, *args]
        code = cli.run([str(arg) for arg in command])
        return Result(code, *capsys.readouterr())

    return run


def layer_of(name: str, inputs: int, outputs: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_down.weight": torch.randn(4, inputs, generator=generator),
        f"{name}.lora_up.weight": torch.randn(outputs, 4, generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }


@pytest.fixture
def lora() -> Path:
    """Changes one layer of the U-Net and one of CLIP-L."""
    assert BASE.clip_l
    width = BASE.clip_l.width
    tensors = layer_of("lora_unet_" + UNET.replace(".", "_"), CONTEXT, DEEPEST, 1)
    tensors |= layer_of("lora_te1_text_model_" + TEXT.replace(".", "_"), width, 4 * width, 2)
    path = Path("loras/deep/style.safetensors")
    path.parent.mkdir(parents=True)
    save_file(tensors, path)
    return path


def test_the_picture_is_that_of_the_merged_checkpoint(
    generate: Generate, models: dict[str, Path], lora: Path
) -> None:
    state, change = load_file(models["base"]), load_file(lora)
    for prefix, name, scale in (
        ("lora_unet_", f"model.diffusion_model.{UNET}", 0.8),
        ("lora_te1_text_model_", f"conditioner.embedders.0.transformer.text_model.{TEXT}", -0.5),
    ):
        key = prefix + name[-len(UNET if prefix == "lora_unet_" else TEXT) :].replace(".", "_")
        delta = change[f"{key}.lora_up.weight"] @ change[f"{key}.lora_down.weight"]
        state[f"{name}.weight"] = state[f"{name}.weight"] + scale * 2 / 4 * delta
    save_model(Path("merged.safetensors"), state, BASE)
    before = models["base"].read_bytes()
    result = generate("a red guitar", "--lora", f"{lora}:0.8:-0.5")
    assert "lora style: 2 of 2 layers matched, rank 4, scale 0.8, -0.5 in the text encoders\n" in result.err
    assert models["base"].read_bytes() == before
    expected = read_pixels(generate("a red guitar", "-m", "merged.safetensors").path).astype(int)
    assert np.abs(read_pixels(result.path) - expected).max() <= 1
    plain = read_pixels(generate("a red guitar").path).astype(int)
    assert np.abs(plain - expected).mean() > 3
    assert np.array_equal(plain, read_pixels(generate("a red guitar", "--lora", f"{lora}:0").path))


def test_a_tag_in_the_prompt_is_the_flag(generate: Generate, lora: Path) -> None:
    by_flag = generate("a red guitar", "--lora", f"{lora}:0.8:0.5").path
    # A1111 writes the text encoders' scale first
    by_tag = generate("a red <lora:Style:0.5:0.8>guitar").path
    assert np.array_equal(read_pixels(by_flag), read_pixels(by_tag))
    by_name = generate("a red guitar", "--lora", "style:0.8:0.5").path
    assert np.array_equal(read_pixels(by_flag), read_pixels(by_name))
    assert not np.array_equal(read_pixels(by_flag), read_pixels(generate("a red guitar").path))


def test_the_picture_remembers_its_loras_and_is_made_again(generate: Generate, lora: Path) -> None:
    first = generate("a red guitar <lora:style:0.7>").path
    texts = read_texts(first)
    whole = lora.read_bytes()
    body = whole[8 + int.from_bytes(whole[:8], "little") :]
    short = hashlib.sha256(body).hexdigest()[:12]
    assert texts.parameters.startswith("a red guitar <lora:style:0.7>\nSteps: 2")
    assert f'Lora hashes: "style: {short}"' in texts.parameters
    record = json.loads(texts.record)
    assert record["loras"] == [
        {
            "name": "style",
            "sha256": hashlib.sha256(whole).hexdigest(),
            "short_hash": short,
            "scale": 0.7,
            "text_scale": 0.7,
            "model": "base",
        }
    ]
    again = generate("--from", first)
    assert read_pixels(again.path).tobytes() == read_pixels(first).tobytes()
    tensors = load_file(lora)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, lora)
    changed = generate("--from", first)
    assert "warning: the picture was made with another file named style [" in changed.err
    assert generate("--from", first, "--set", "lora=[]").err.count("lora style") == 0


def test_a_refiner_lora_goes_to_the_refiner(generate: Generate, models: dict[str, Path]) -> None:
    layer = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v"
    unet = REFINER.unet
    tensors = layer_of(layer, unet.context_dim, unet.model_channels * unet.channel_mult[-1], 3)
    save_file(tensors, "fine.safetensors")
    asked = ("a red guitar", "--refiner", models["refiner"], "--refiner-switch-at", 0.5, "--steps", 4)
    result = generate(*asked, "--lora", "fine.safetensors")
    assert "lora fine: 1 of 1 layers of the refiner matched, rank 4, scale 1\n" in result.err
    assert not np.array_equal(read_pixels(result.path), read_pixels(generate(*asked).path))
    assert json.loads(read_texts(result.path).record)["loras"][0]["model"] == "refiner"
    alone = generate("a red guitar", "--lora", "fine.safetensors")
    assert alone.code == 3
    assert f"is a LoRA for a model with text features {unet.context_dim} wide" in alone.err


def test_what_does_not_fit_is_a_warning(generate: Generate, lora: Path) -> None:
    save_file(load_file(lora) | layer_of("lora_unet_middle_block_7_x", 8, 8, 1), lora)
    err = generate("a red guitar", "--lora", lora).err
    assert "lora style: 2 of 3 layers matched" in err
    assert "warning: lora style: 1 of 3 layers is not in base" in err
    assert "does nothing: lora_unet_middle_block_7_x" in err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (
            ["x <lora:stile:1>"],
            3,
            "LoRA 'stile': no such file, nor one of that name in the folder loras; did you mean style",
        ),
        (["x", "--lora", "gone.safetensors"], 3, "LoRA 'gone.safetensors': no such file"),
        (["x <lora:style:much>"], 2, "<lora:style:much>: expected <lora:name:0.8>"),
        (["x <lora::1>"], 2, "<lora::1>: expected <lora:name:0.8>"),
        (["x", "-n", "<lora:style:1>"], 2, "negative prompt: a LoRA changes the model"),
        (
            ["x <lora:style:1>", "--lora-dir", "elsewhere"],
            3,
            "no such file, and no folder elsewhere; give a path",
        ),
    ],
)
def test_mistakes_are_one_line(generate: Generate, lora: Path, args: list[str], code: int, said: str) -> None:
    result = generate(*args)
    assert result.code == code
    assert said in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("a.safetensors", LoraUse("a.safetensors", 1.0, 1.0)),
        ("a.safetensors:0.8", LoraUse("a.safetensors", 0.8, 0.8)),
        ("dir/a:-1:.5", LoraUse("dir/a", -1.0, 0.5)),
        (r"C:\loras\a.safetensors:1e-1", LoraUse(r"C:\loras\a.safetensors", 0.1, 0.1)),
    ],
)
def test_flags_are_read_as_typed(text: str, use: LoraUse) -> None:
    assert LoraUse.parse(text) == use
    assert LoraUse.parse(str(use)) == use


@pytest.mark.parametrize(
    ("prompt", "left", "uses"),
    [
        ("a cat", "a cat", ()),
        ("a cat <lora:one:0.5>, blue <lyco:two>", "a cat , blue", ("one:0.5", "two:1")),
        ("<lora:one:0.5:0.8>a cat", "a cat", ("one:0.8:0.5",)),
        ("<lora:one:unet=0.8:te=0.5> a", "a", ("one:0.8:0.5",)),
        ("<lora:one:te=0.5> a", "a", ("one:0.5",)),
        ("a < b <b:1>", "a < b <b:1>", ()),
    ],
)
def test_tags_as_a1111_reads_them(prompt: str, left: str, uses: tuple[str, ...]) -> None:
    assert take_tags(prompt) == (left, uses)


def test_a_request_has_its_loras_in_one_place() -> None:
    request = GenerateRequest(prompt="a <lora:one:0.5>", prompt_2="b <lora:two>", lora=("zero:2",))
    assert (request.prompt, request.prompt_2) == ("a", "b")
    assert request.lora == ("zero:2", "one:0.5", "two:1")


def test_two_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.safetensors").touch()
    with pytest.raises(FileError, match="have that name; say which, with its folder"):
        find_lora("x", tmp_path)
    assert find_lora("b/x", tmp_path) == tmp_path / "b" / "x.safetensors"


def test_a_malformed_flag_is_told() -> None:
    with pytest.raises(UsageError, match="expected FILE"):
        LoraUse.parse("")
