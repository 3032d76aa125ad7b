"""LoRA files that diffusers and PEFT write do to our model what the active adapter does to diffusers' networks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from sdxl_cli.model.sdxl import SDXL
from tests.checkpoint.lora_peers import (
    BOUND,
    VISIBLE,
    Theirs,
    fitted,
    merged,
    our_model,
    our_outputs,
    scramble,
)
from tests.model.peers import relative

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    # without a configuration in the file, a reader takes alpha to be the rank
    "plain": lambda targets: peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets),
    "alpha": lambda targets: peft.LoraConfig(r=4, lora_alpha=9, target_modules=targets),
    "patterns": lambda targets: peft.LoraConfig(
        r=4,
        lora_alpha=3,
        rank_pattern={targets[0]: 6},
        alpha_pattern={targets[1]: 7},
        target_modules=targets,
    ),
    "rank-stabilised": lambda targets: peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=targets
    ),
    "DoRA": lambda targets: peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=targets),
}


@pytest.fixture(scope="module")
def model() -> SDXL:
    return our_model()


def adapted(theirs: Theirs, config: Callable[[list[str]], Any]) -> Theirs:
    """Give the three networks adapters of random values."""
    networks = ((theirs.unet, EVERYTHING), (theirs.clip_l, TEXT), (theirs.big_g, TEXT))
    for network, targets in networks:
        network.add_adapter(config(targets))
        parameters = [(name, p) for name, p in network.named_parameters() if "lora_" in name]
        scramble([p for name, p in parameters if "magnitude" not in name], std=0.15)
        with torch.no_grad():
            for name, parameter in parameters:
                if "magnitude" in name:
                    parameter.mul_(1.2)
    return theirs


def saved(theirs: Theirs, folder: Path, *, metadata: bool) -> Path:
    """Let diffusers' pipeline class write the three adapters into one file."""
    layers = {
        f"{part}_lora_layers": peft.get_peft_model_state_dict(network, adapter_name="default")
        for part, network in (
            ("unet", theirs.unet),
            ("text_encoder", theirs.clip_l),
            ("text_encoder_2", theirs.big_g),
        )
    }
    notes = {
        f"{part}_lora_adapter_metadata": network.peft_config["default"].to_dict()
        for part, network in (
            ("unet", theirs.unet),
            ("text_encoder", theirs.clip_l),
            ("text_encoder_2", theirs.big_g),
        )
    }
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **(notes if metadata else {}))
    return folder


def assert_same(theirs: Theirs, model: SDXL, *loras: Any) -> None:
    for ours, expected, before in zip(
        our_outputs(merged(model, *loras)), theirs.outputs(), our_outputs(model), strict=True
    ):
        assert relative(ours, expected) < BOUND
        assert relative(ours, before) > VISIBLE


@pytest.mark.parametrize("name", ["patterns", "rank-stabilised", "DoRA"])
def test_a_file_of_the_pipeline(name: str, model: SDXL, tmp_path: Path) -> None:
    theirs = adapted(Theirs(model), CONFIGS[name])
    path = saved(theirs, tmp_path / "lora", metadata=True)
    assert fitted(path, model).unmatched == ()
    assert_same(theirs, model, (path, 1.0))


def test_a_file_of_the_u_net_alone_and_a_scale(model: SDXL, tmp_path: Path) -> None:
    theirs = adapted(Theirs(model), CONFIGS["alpha"])
    theirs.unet.save_lora_adapter(tmp_path)
    theirs.unet.set_adapters("default", 0.6)
    ours = our_outputs(merged(model, (tmp_path / "pytorch_lora_weights.safetensors", 0.6))).unet
    assert relative(ours, theirs.outputs().unet) < BOUND


def test_a_folder_of_peft_with_its_configuration_beside(model: SDXL, tmp_path: Path) -> None:
    theirs = Theirs(model)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION)
    wrapped = peft.get_peft_model(theirs.unet, config)
    scramble([p for name, p in wrapped.named_parameters() if "lora_" in name], std=0.15)
    wrapped.save_pretrained(tmp_path / "mine")
    assert any(
        key.startswith("base_model.model.") for key in load_file(tmp_path / "mine/adapter_model.safetensors")
    )
    assert fitted(tmp_path / "mine", model).lora.name == "mine"
    assert relative(our_outputs(merged(model, (tmp_path / "mine", 1.0))).unet, theirs.outputs().unet) < BOUND


def test_two_files_add_up_each_with_its_scales(model: SDXL, tmp_path: Path) -> None:
    theirs = adapted(Theirs(model), CONFIGS["plain"])
    first = saved(theirs, tmp_path / "first", metadata=False)
    networks = ((theirs.unet, EVERYTHING), (theirs.clip_l, TEXT), (theirs.big_g, TEXT))
    for network, targets in networks:
        network.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets), "second")
        scramble([p for name, p in network.named_parameters() if ".second." in name], std=0.15, seed=5)
        layers = peft.get_peft_model_state_dict(network, adapter_name="second")
        save_file({f"{part_of(network)}.{key}": value for key, value in layers.items()}, tmp_path / "part")
        (tmp_path / "part").rename(tmp_path / f"{part_of(network)}.safetensors")
    seconds = [tmp_path / f"{part_of(network)}.safetensors" for network, _ in networks]
    for network, scales in (
        (theirs.unet, (0.5, -0.3)),
        (theirs.clip_l, (0.8, 0.4)),
        (theirs.big_g, (0.8, 0.4)),
    ):
        set_scales(network, dict(zip(("default", "second"), scales, strict=True)))
    assert_same(theirs, model, (first, 0.5, 0.8), *((path, -0.3, 0.4) for path in seconds))


def part_of(network: Any) -> str:
    return {
        "UNet2DConditionModel": "unet",
        "CLIPTextModel": "text_encoder",
        "CLIPTextModelWithProjection": "text_encoder_2",
    }[type(network).__name__]


def set_scales(network: Any, scales: dict[str, float]) -> None:
    for module in network.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_adapter(list(scales))
            for name, scale in scales.items():
                module.set_scale(name, scale)


def test_names_that_older_versions_of_diffusers_wrote(model: SDXL, tmp_path: Path) -> None:
    theirs = adapted(
        Theirs(model),
        lambda targets: peft.LoraConfig(r=4, lora_alpha=4, target_modules=[*ATTENTION, *TEXT[:4]]),
    )
    new = load_file(saved(theirs, tmp_path / "new", metadata=False) / "pytorch_lora_weights.safetensors")
    old = {}
    for key, tensor in new.items():
        module, _, ending = key.partition(".lora_")
        ending = {"A.weight": "down.weight", "B.weight": "up.weight"}[ending]
        if key.startswith("unet"):
            block, _, layer = module.rpartition(".to_")
            old[f"{block}.processor.to_{layer.removesuffix('.0')}_lora.{ending}"] = tensor
        else:
            old[f"{module}.lora_linear_layer.{ending}"] = tensor
    save_file(old, tmp_path / "old.safetensors")
    assert fitted(tmp_path / "old.safetensors", model).unmatched == ()
    assert_same(theirs, model, (tmp_path / "old.safetensors", 1.0))


def test_the_block_names_of_the_original_are_those_diffusers_translates(model: SDXL, tmp_path: Path) -> None:
    """kohya's files with ``input_blocks_…``: diffusers renames them, we read them as they are."""
    state = model.unet.state_dict()
    generator = torch.Generator().manual_seed(3)
    kohya = {}
    for name, weight in state.items():
        if name.endswith(".weight") and weight.ndim == 2 and ".transformer_blocks." in name:
            layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            kohya[f"{layer}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.15
            kohya[f"{layer}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.15
            kohya[f"{layer}.alpha"] = torch.tensor(3.0)
    path = tmp_path / "kohya.safetensors"
    save_file(kohya, path)
    theirs = Theirs(model)
    translated, alphas = StableDiffusionXLPipeline.lora_state_dict(
        dict(kohya), unet_config=theirs.unet.config
    )
    StableDiffusionXLPipeline.load_lora_into_unet(translated, network_alphas=alphas, unet=theirs.unet)
    ours = our_outputs(merged(model, (path, 1.0))).unet
    assert relative(ours, theirs.outputs().unet) < BOUND
    assert relative(ours, our_outputs(model).unet) > VISIBLE
    # and under diffusers' block names, the other of kohya's two writings
    renamed = {}
    for key, tensor in translated.items():
        match = re.fullmatch(r"unet\.(.*?)(?:\.processor)?((?:\.to_\w+?)?)[._]lora\.(\w+)\.weight", key)
        assert match, key
        layer = (match[1] + match[2]).replace(".", "_") + ("_0" if match[2] == ".to_out" else "")
        renamed[f"lora_unet_{layer}.lora_{match[3]}.weight"] = tensor
    assert len(renamed) == len(kohya) * 2 // 3
    save_file(renamed, tmp_path / "other.safetensors")
    found = fitted(tmp_path / "other.safetensors", model)
    assert found.unmatched == ()
    assert found.edits.keys() == fitted(path, model).edits.keys()


def test_a_damaged_configuration_is_told(tmp_path: Path) -> None:
    from sdxl_cli.checkpoint.lora import Lora
    from sdxl_cli.errors import FileError

    path = tmp_path / "lora.safetensors"
    tensors = {
        "unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.zeros(16, 1, 1, 1),
    }
    for text in ("{", json.dumps([1])):
        save_file(tensors, path, metadata={"lora_adapter_metadata": text})
        with pytest.raises(FileError, match=r"lora\.safetensors: its configuration of the adapter"):
            Lora(path)
