"""Pictures of other programs: what they say, by those programs' own formats, as our requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from sdxl_cli import cli
from sdxl_cli.generation import a1111, comfyui
from sdxl_cli.generation.metadata import ModelRecord, Record, read_record
from sdxl_cli.generation.picture import read_texts
from sdxl_cli.generation.recall import recall
from sdxl_cli.generation.request import GenerateRequest

A1111 = (
    "a lighthouse at dusk, (dramatic sky:1.2),\n<lora:detail:0.6>\n"
    "Negative prompt: blurry, text: none,\nlow quality\n"
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3735928559, Size: 832x1216, "
    "Model hash: 31e35c80fc, Model: sd_xl_base_1.0, VAE hash: 235745af8d, VAE: sdxl_vae.safetensors, RNG: CPU, "
    'Lora hashes: "detail: 0123456789ab", Version: v1.10.1'
)


def graph(**changes: Any) -> dict[str, Any]:
    """The default txt2img graph of ComfyUI, API format, with SDXL's size; ``changes`` replace or add nodes."""
    nodes = {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 156680208700286, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal",
                "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "xl\\juggernaut.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 1216, "height": 832, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a glass bottle", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "watermark", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    }  # fmt: skip
    return nodes | {name.removeprefix("n"): node for name, node in changes.items()}


def test_a1111_text_is_read_by_its_own_rules() -> None:
    found = a1111.read(A1111)
    assert found.fields["prompt"] == "a lighthouse at dusk, (dramatic sky:1.2),\n<lora:detail:0.6>"
    assert found.fields["negative_prompt"] == "blurry, text: none,\nlow quality"
    expected = {
        "steps": 28, "sampler": "dpmpp_2m", "scheduler": "karras", "cfg_scale": 6.5, "seed": 3735928559,
        "size": "832x1216",
    }  # fmt: skip
    assert {name: found.fields[name] for name in expected} == expected
    assert found.models == {
        "base": ModelRecord("sd_xl_base_1.0", "31e35c80fc"),
        "vae": ModelRecord("sdxl_vae", "235745af8d"),
    }
    assert found.remarks == []


@pytest.mark.parametrize(
    ("said", "sampler", "scheduler"),
    [
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", "karras"),  # before 1.9
        ("Sampler: Euler", "euler", "normal"),
        ("Sampler: Euler, Schedule type: SGM Uniform", "euler", "sgm_uniform"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("Sampler: Euler, Schedule type: Automatic", "euler", "normal"),
        ("Sampler: DPM++ 2M Exponential", "dpmpp_2m", "exponential"),
    ],
)
def test_samplers_and_schedules_by_their_labels(said: str, sampler: str, scheduler: str) -> None:
    found = a1111.read(f"x\nSteps: 20, {said}, CFG scale: 7, Seed: 1, RNG: CPU")
    assert (found.fields["sampler"], found.fields["scheduler"], found.remarks) == (sampler, scheduler, [])


def test_what_has_no_counterpart_is_said() -> None:
    found = a1111.read(
        "x\nSteps: 20, Sampler: DPM fast, CFG scale: 7, Seed: 1, Clip skip: 3, Variation seed: 5, "
        'Emphasis: Ignore, NGMS: 2, ControlNet 0: "preprocessor: canny, model: c", Version: v1.8.0'
    )
    told = "\n".join(found.remarks)
    for words in (
        "DPM fast",
        "Clip skip: 3",
        "Variation seed: 5",
        "Emphasis: Ignore",
        "NGMS: 2",
        "canny",
        "RNG: GPU",
    ):
        assert words in told, words
    assert "sampler" not in found.fields


def test_a_last_line_with_few_pairs_is_part_of_the_prompt() -> None:
    """A1111's own rule."""
    assert a1111.parse("a cat\nStyle: oil, Size: big").prompt == "a cat\nStyle: oil, Size: big"
    assert a1111.parse("a cat\nStyle: oil, Size: big").pairs == {}


def test_our_own_parameters_come_back() -> None:
    request = GenerateRequest(
        prompt='a "cat", sat\non: a mat', negative_prompt="a dog,\nred", steps=17, cfg_scale=3.5, sampler="euler",
        scheduler="normal", seed=77, size="832x640", clip_skip=3,
    )  # fmt: skip
    framing = request.framing((64, 64), buckets=(), multiple=8)
    models = {"base": ModelRecord("my, model: 2", "ab" * 32)}
    made = Record(
        kind="generate", request=request, framing=framing, models=models, run={}, sampler_label="Euler"
    )
    found = a1111.read(made.parameters())
    assert GenerateRequest(**found.fields) == request
    assert found.models["base"] == ModelRecord("my, model: 2", "ab" * 5)
    assert found.remarks == []


def test_hires_fix_has_the_strength_for_itself() -> None:
    text = (
        "x\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Denoising strength: 0.5, RNG: CPU, "
        "Hires upscale: 1.5, Hires steps: 8, Hires upscaler: "
    )
    found = a1111.read(text + "Latent")
    found.needs_picture({})
    request = GenerateRequest(**found.fields)
    assert (request.hires_scale, request.hires_steps, request.hires_denoising_strength) == (1.5, 8, 0.5)
    assert (request.hires_upscaler, request.strength, found.remarks) == ("latent", None, [])
    assert a1111.read(text + "R-ESRGAN 4x+").remarks == [
        "Hires upscaler: R-ESRGAN 4x+: is not here; the default takes its place"
    ]


def test_inpainting_needs_the_pictures_that_are_not_in_it() -> None:
    text = (
        "x\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Denoising strength: 0.6, Mask blur: 8, "
        "Inpaint area: Only masked, Masked area padding: 16, RNG: CPU"
    )
    alone = a1111.read(text)
    alone.needs_picture({})
    assert not {"strength", "mask_blur", "only_masked", "mask_padding"} & alone.fields.keys()
    assert "give --mask" in alone.remarks[0]
    assert "give --init-img" in alone.remarks[1]
    given = a1111.read(text)
    given.needs_picture({"init_img": "a.png", "mask": "m.png"})
    request = GenerateRequest(init_img="a.png", mask="m.png", **given.fields)
    assert (request.strength, request.mask_blur, request.only_masked, request.mask_padding) == (
        0.6,
        8,
        True,
        16,
    )
    assert given.remarks == []


def test_comfyuis_default_graph() -> None:
    found = comfyui.read(json.dumps(graph()))
    expected = {
        "prompt": "a glass bottle", "negative_prompt": "watermark", "steps": 20, "cfg_scale": 8.0,
        "sampler": "euler", "scheduler": "normal", "seed": 156680208700286, "size": "1216x832",
        "prompt_syntax": "comfy",
    }  # fmt: skip
    assert found.fields == expected
    assert found.models == {"base": ModelRecord("juggernaut", None)}
    assert found.remarks == []


def test_a_graph_with_sdxls_encoder_a_loader_and_a_text_node() -> None:
    sizes = {
        "width": 2048,
        "height": 1024,
        "crop_w": 4,
        "crop_h": 8,
        "target_width": 1216,
        "target_height": 832,
    }
    found = comfyui.read(
        json.dumps(
            graph(
                n6={
                    "class_type": "CLIPTextEncodeSDXL",
                    "inputs": {"text_g": "wide view", "text_l": ["20", 0], "clip": ["11", 0], **sizes},
                },
                n20={"class_type": "PrimitiveString", "inputs": {"value": "a bottle"}},
                n11={
                    "class_type": "CLIPSetLastLayer",
                    "inputs": {"stop_at_clip_layer": -3, "clip": ["4", 1]},
                },
                n12={"class_type": "VAELoader", "inputs": {"vae_name": "sdxl_vae.safetensors"}},
                n8={"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["12", 0]}},
                n7={"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}},
            )
        )
    )
    expected = {
        "prompt": "a bottle", "prompt_2": "wide view", "negative_prompt": None, "clip_skip": 3,
        "original_size": "2048x1024", "crop_top_left": "8,4", "target_size": "1216x832",
    }  # fmt: skip
    assert {name: found.fields[name] for name in expected} == expected
    assert found.models["vae"] == ModelRecord("sdxl_vae", None)
    assert found.remarks == []


def test_base_and_refiner_of_comfyuis_sdxl_example() -> None:
    advanced = dict(graph()["3"]["inputs"])
    del advanced["seed"], advanced["denoise"]
    base = {**advanced, "add_noise": "enable", "noise_seed": 7, "steps": 25, "start_at_step": 0, "end_at_step": 20,
            "return_with_leftover_noise": "enable"}  # fmt: skip
    refiner = {**advanced, "add_noise": "disable", "noise_seed": 0, "steps": 25, "start_at_step": 20,
               "end_at_step": 10000, "model": ["13", 0], "latent_image": ["3", 0], "positive": ["14", 0],
               "negative": ["15", 0], "return_with_leftover_noise": "disable"}  # fmt: skip
    found = comfyui.read(
        json.dumps(
            graph(
                n3={"class_type": "KSamplerAdvanced", "inputs": base},
                n10={"class_type": "KSamplerAdvanced", "inputs": refiner},
                n13={
                    "class_type": "CheckpointLoaderSimple",
                    "inputs": {"ckpt_name": "sd_xl_refiner_1.0.safetensors"},
                },
                n14={"class_type": "CLIPTextEncode", "inputs": {"text": "a glass bottle", "clip": ["13", 1]}},
                n15={"class_type": "CLIPTextEncode", "inputs": {"text": "watermark", "clip": ["13", 1]}},
                n8={"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["13", 2]}},
            )
        )
    )
    assert (found.fields["seed"], found.fields["steps"], found.fields["refiner_switch_at"]) == (7, 25, 0.8)
    assert found.models == {
        "base": ModelRecord("juggernaut", None),
        "refiner": ModelRecord("sd_xl_refiner_1.0", None),
    }
    assert [remark.partition(":")[0] for remark in found.remarks] == ["node 10 (KSamplerAdvanced)"]


def test_loras_in_the_order_they_changed_the_weights() -> None:
    def loader(kind: str, name: str, model: str, **scales: float) -> dict[str, Any]:
        return {
            "class_type": kind,
            "inputs": {"lora_name": name, "model": [model, 0], "clip": [model, 1], **scales},
        }

    found = comfyui.read(
        json.dumps(
            graph(
                n10=loader("LoraLoader", "xl/first.safetensors", "4", strength_model=0.8, strength_clip=0.5),
                n11=loader("LoraLoaderModelOnly", "second.safetensors", "10", strength_model=1.0),
                n3={"class_type": "KSampler", "inputs": {**graph()["3"]["inputs"], "model": ["11", 0]}},
            )
        )
    )
    assert found.fields["lora"] == ["first:0.8:0.5", "second:1.0:0"]
    assert found.remarks == []


def test_nodes_nobody_knows_are_named() -> None:
    found = comfyui.read(
        json.dumps(
            graph(
                n16={"class_type": "FreeU_V2", "inputs": {"model": ["4", 0], "b1": 1.3}},
                n17={"class_type": "ImageScale", "inputs": {"image": ["8", 0], "width": 2000}},
                n9={"class_type": "SaveImage", "inputs": {"images": ["17", 0]}},
                n3={"class_type": "KSampler", "inputs": {**graph()["3"]["inputs"], "model": ["16", 0]}},
            )
        )
    )
    assert sorted(found.remarks) == [
        "node 16 (FreeU_V2): has no counterpart here",
        "node 17 (ImageScale): has no counterpart here",
    ]
    assert found.models["base"].name == "juggernaut"
    none = comfyui.read(json.dumps({"1": {"class_type": "FluxSampler", "inputs": {}}}))
    assert "no sampler that is known here" in none.remarks[0]


def save_png(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text) if any(ord(c) > 255 for c in text) else info.add_text(key, text)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_user_comments_of_jpegs_in_either_byte_order(tmp_path: Path, order: str) -> None:
    """A1111 writes them through piexif, big-endian; other writers take the machine's order."""
    text = A1111.replace("lighthouse", "Leuchtturm für 日本")
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode(order)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_texts(tmp_path / "a.jpg").parameters == text


def test_comfyui_graphs_in_png_and_webp(tmp_path: Path) -> None:
    png = save_png(tmp_path / "c.png", prompt=json.dumps(graph()), workflow="{}")
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(graph())
    exif[0x010F] = "workflow:{}"
    Image.new("RGB", (8, 8)).save(tmp_path / "c.webp", exif=exif)
    for path in (png, tmp_path / "c.webp"):
        found = recall(path)
        assert found is not None
        assert getattr(found, "fields")["prompt"] == "a glass bottle"  # noqa: B009
    assert recall(save_png(tmp_path / "d.png", prompt="just a text")) is None


def test_from_a_picture_of_a1111(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = (
        "a red guitar\nSteps: 2, Sampler: Euler a lot, Schedule type: Exponential, CFG scale: 3, Seed: 4, Size: 72x64, "
        "NGMS: 2, Model: base"
    )
    picture = save_png(tmp_path / "theirs.png", parameters=text)
    args = ["generate", "--from", str(picture), "--sampler", "euler"]
    assert cli.run(args) == 2
    assert "made with base, which is neither here nor beside it; give --model" in capsys.readouterr().err
    (tmp_path / "base.safetensors").symlink_to(models["base"])
    assert cli.run(args) == 0
    captured = capsys.readouterr()
    for words in ("NGMS: 2: has no counterpart", "Sampler: Euler a lot: no such sampler", "RNG: GPU"):
        assert f"warning: {words}" in captured.err
    stored = read_record(Path(captured.out.strip()))
    assert stored is not None
    request = stored.request
    assert isinstance(request, GenerateRequest)
    assert (request.prompt, request.steps, request.cfg_scale, request.seed) == ("a red guitar", 2, 3.0, 4)
    assert (request.size, request.sampler, request.scheduler) == ("72x64", "euler", "exponential")
