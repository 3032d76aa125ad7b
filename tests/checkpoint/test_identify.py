"""A file is known by its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest

from sdxl_cli.checkpoint.identify import compare, identify
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import BASE, REFINER, ModelConfig, VAEConfig

Shapes = dict[str, tuple[int, ...]]
Manifest = Callable[[str], Shapes]
UNET = "model.diffusion_model."
ATTN2 = "input_blocks_4_1_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("file", "kind", "config", "tensors", "parameters"),
    [
        # float elements of the published files, and the 77 position ids of the base
        ("sd_xl_base_1.0", "base", BASE, 2515, 3_468_837_868 + 77),
        ("sd_xl_refiner_1.0", "refiner", REFINER, 1858, 3_037_840_364),
        ("sdxl_vae", "vae", BASE, 248, 83_653_863),
        ("diffusers_vae", "vae", BASE, 248, 83_653_863),
        ("diffusers_base_unet", "unet", None, 1680, 2_567_463_684),
        ("diffusers_refiner_unet", "unet", None, 1220, 2_259_526_660),
        ("diffusers_text_encoder", "text encoder", None, 196, 123_060_480),
        ("diffusers_text_encoder_2", "text encoder", None, 517, 694_659_840),
    ],
)
def test_the_published_files_are_recognised(
    file: str, kind: str, config: ModelConfig | None, tensors: int, parameters: int, manifest: Manifest
) -> None:
    found = identify(manifest(file), {})
    assert (found.kind, found.config, found.tensors, found.parameters) == (kind, config, tensors, parameters)
    assert found.prediction == "eps"
    assert found.ignored == ()


@pytest.mark.parametrize(
    ("shapes", "kind", "label"),
    [
        (
            {"cond_stage_model.transformer.x": (1,), f"{UNET}out.0.bias": (320,)},
            "other",
            "Stable Diffusion 1",
        ),
        ({"cond_stage_model.model.ln_final.bias": (1024,)}, "other", "Stable Diffusion 2"),
        ({f"{UNET}joint_blocks.0.x": (1,)}, "other", "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.x": (1,)}, "other", "Flux"),
        ({f"lora_unet_{ATTN2}.lora_down.weight": (32, 2048)}, "adapter", r"LoRA \(SDXL, rank 32\)"),
        (
            {f"lora_unet_{ATTN2}.lora_down.weight": (8, 768)},
            "adapter",
            r"LoRA \(Stable Diffusion 1, rank 8\)",
        ),
        ({"unet.down_blocks.1.attn2.to_k.lora_A.weight": (4, 2048)}, "adapter", r"LoRA \(SDXL, rank 4\)"),
        ({"controlnet_cond_embedding.conv_in.bias": (16,), "conv_in.bias": (320,)}, "adapter", "ControlNet"),
        ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "adapter", "textual inversion"),
        ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "unet", "another architecture"),
        (
            {"encoder.conv_in.weight": (1,), "decoder.conv_in.weight": (512, 16, 3, 3)},
            "other",
            "16 latent channels",
        ),
        ({"model.layers.0.mlp.weight": (1,)}, "other", "no model this program knows"),
        ({}, "other", "0 tensors: none"),
    ],
)
def test_other_things_are_named(shapes: Shapes, kind: str, label: str) -> None:
    found = identify(shapes, {})
    assert found.kind == kind
    assert re.search(label, found.label)


def with_input_channels(shapes: Shapes, count: int) -> Shapes:
    return shapes | {f"{UNET}input_blocks.0.0.weight": (320, count, 3, 3)}


def test_inpainting_is_known_by_its_nine_channels(manifest: Manifest) -> None:
    found = identify(with_input_channels(manifest("sd_xl_base_1.0"), 9), {})
    assert found.kind == "inpaint"
    assert found.config == replace(BASE, unet=replace(BASE.unet, in_channels=9))
    assert identify(with_input_channels(manifest("sd_xl_base_1.0"), 8), {}).kind == "other"


def test_playground_is_no_sdxl_schedule(manifest: Manifest) -> None:
    found = identify(manifest("sd_xl_base_1.0") | {"edm_mean": (1, 4, 1, 1)}, {})
    assert found.kind == "other"
    assert "EDM" in found.label


@pytest.mark.parametrize(
    ("extra", "metadata", "prediction"),
    [
        ({}, {"modelspec.prediction_type": "epsilon"}, "eps"),
        ({}, {"modelspec.prediction_type": "v"}, "v"),
        ({}, {"modelspec.prediction_type": "sample"}, "x0"),
        ({"ztsnr": (0,)}, {}, "eps"),
        ({"v_pred": (0,)}, {}, "v"),
        ({"v_pred": (0,), "ztsnr": (0,)}, {}, "v"),
    ],
)
def test_what_the_unet_predicts(
    extra: Shapes, metadata: dict[str, str], prediction: str, manifest: Manifest
) -> None:
    found = identify(manifest("sd_xl_base_1.0") | extra, metadata)
    assert (found.kind, found.prediction) == ("base", prediction)
    assert found.zero_terminal_snr == ("ztsnr" in extra)


def test_what_fine_tunes_add_is_ignored(manifest: Manifest) -> None:
    extra: Shapes = {
        "denoiser.sigmas": (1000,),
        "alphas_cumprod": (1000,),
        "model_ema.diffusion_modelout0bias": (320,),
        "model_ema.num_updates": (),
    }
    found = identify(manifest("sd_xl_base_1.0") | extra, {})
    assert found.kind == "base"
    assert set(found.ignored) == set(extra)


def test_the_metadata_has_the_sizes_of_other_models(small_config: ModelConfig, manifest: Manifest) -> None:
    notes = {"sdxl.config": json.dumps(small_config.to_dict())}
    assert identify(manifest("sd_xl_base_1.0"), notes).config == small_config
    with pytest.raises(FileError, match=r"sdxl\.config"):
        identify(manifest("sd_xl_base_1.0"), {"sdxl.config": "{"})
    with pytest.raises(FileError, match="channels_typo"):
        identify(manifest("sdxl_vae"), {"sdxl.config": '{"vae": {"channels_typo": 3}}'})


def test_a_vae_states_its_own_sizes_only(manifest: Manifest) -> None:
    config = VAEConfig(channels=24, scale_factor=0.7)
    found = identify(manifest("sdxl_vae"), {"sdxl.config": json.dumps({"vae": asdict(config)})})
    assert found.config == replace(BASE, vae=config)


def test_differences_are_one_line_with_the_first_names() -> None:
    expected = {f"w{index}": (2, 3) for index in range(5)} | {
        "conv": (4, 4, 1, 1),
        "logit_scale": (),
        "a.b": (1,),
    }
    shapes = {"w0": (2, 4), "conv": (4, 4), "new": (1,), "x.position_ids": (1, 77), "a.b": (1,)}
    found = compare(shapes, expected)
    assert found.missing == ("w1", "w2", "w3", "w4", "logit_scale")
    assert str(found) == (
        "5 missing: w1, w2, w3, …; 1 mis-shaped: w0 [2, 4] instead of [2, 3]; 1 unexpected: new"
    )
    assert str(compare(expected, expected)) == ""
