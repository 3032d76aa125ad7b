"""Files with exactly the published tensors, made of holes: they have the size of the real ones and no bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_cli.checkpoint.header import ITEM_SIZE
from sdxl_cli.checkpoint.locate import Role, locate
from sdxl_cli.checkpoint.read import load_model
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import BASE, REFINER, ModelConfig

Shapes = dict[str, tuple[int, ...]]
Manifest = Callable[[str], Shapes]
Dtypes = Callable[[str], dict[str, str]]
F16 = torch.float16

TOWER_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
TOWER_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"}
UNET: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "layers_per_block": 2,
    "num_attention_heads": None,
    "sample_size": 128,
    "use_linear_projection": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "unet": UNET
    | {
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
    },
    "text_encoder": TOWER_L | {"projection_dim": 768},
    "text_encoder_2": TOWER_G | {"projection_dim": 1280},
}
"""What the published config.json files say, as far as it is read."""
REFINER_UNET = UNET | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
}
FILES = {
    "vae": "diffusers_vae",
    "text_encoder": "diffusers_text_encoder",
    "text_encoder_2": "diffusers_text_encoder_2",
}


def write_hole(path: Path, shapes: Shapes, dtypes: dict[str, str]) -> None:
    table: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * ITEM_SIZE[dtypes[name]]
        table[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)


@pytest.mark.parametrize(
    ("file", "role", "config", "parameters"),
    [
        ("sd_xl_base_1.0", "base", BASE, 3_468_837_868),
        ("sd_xl_refiner_1.0", "refiner", REFINER, 3_037_840_364),
    ],
)
def test_the_released_single_files_load(
    file: str,
    role: Role,
    config: ModelConfig,
    parameters: int,
    manifest: Manifest,
    manifest_dtypes: Dtypes,
    tmp_path: Path,
) -> None:
    path = tmp_path / f"{file}.safetensors"
    write_hole(path, manifest(file), manifest_dtypes(file))
    files = locate(str(path), role)
    assert files.config == config
    model = load_model(files, dtype=F16, vae_dtype=F16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("role", ["base", "refiner"])
def test_the_released_folders_load(role: Role, manifest: Manifest, tmp_path: Path) -> None:
    config = {"base": BASE, "refiner": REFINER}[role]
    settings = SETTINGS if role == "base" else SETTINGS | {"unet": REFINER_UNET}
    index = {"_class_name": "StableDiffusionXLPipeline"}
    if role == "refiner":
        settings = {name: values for name, values in settings.items() if name != "text_encoder"}
        index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    for name, values in settings.items():
        shapes = manifest(FILES.get(name, f"diffusers_{role}_unet"))
        stem = "model" if "text" in name else "diffusion_pytorch_model"
        write_hole(tmp_path / name / f"{stem}.fp16.safetensors", shapes, dict.fromkeys(shapes, "F16"))
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    files = locate(str(tmp_path), role)
    assert files.config == config
    model = load_model(files, ("unet", "vae"), dtype=F16, vae_dtype=F16)
    assert model.parts == ("unet", "vae")


def test_the_released_vae_loads(manifest: Manifest, manifest_dtypes: Dtypes, tmp_path: Path) -> None:
    path = tmp_path / "sdxl_vae.safetensors"
    write_hole(path, manifest("sdxl_vae"), manifest_dtypes("sdxl_vae"))
    model = load_model(locate(str(path), "vae"), ("vae",), dtype=F16, vae_dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863


def test_a_refiner_given_as_base_is_refused(
    manifest: Manifest, manifest_dtypes: Dtypes, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    name = "sd_xl_refiner_1.0"
    write_hole(path, manifest(name), manifest_dtypes(name))
    with pytest.raises(
        FileError, match="is an SDXL refiner model, not an SDXL base model; give it with --refiner"
    ):
        locate(str(path), "base")
    os.truncate(path, 3_100_000_000)
    with pytest.raises(FileError, match=r"3\.1 of 6\.1 GB are here; download it again"):
        locate(str(path), "refiner")
