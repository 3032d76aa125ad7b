"""Every name a trainer gives a layer of the released models is found, once; files for other models are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdxl_cli.checkpoint.lora import Lora, LoraMerge, WornLora, fit_to
from sdxl_cli.checkpoint.lora_targets import Slots, slots
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import BASE, REFINER, ModelConfig

Shapes = dict[str, tuple[int, ...]]
Manifest = Callable[[str], Shapes]


@pytest.fixture(scope="module")
def released(manifest: Manifest) -> Shapes:
    return manifest("sd_xl_base_1.0")


@pytest.fixture(scope="module")
def table(released: Shapes) -> Slots:
    return slots(released, BASE)


def linear_of_transformers(shapes: Shapes, block: str) -> list[str]:
    """What sd-scripts adapts: linear layers (and 1x1 convolutions) inside the spatial transformers."""
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if re.search(block, name) and name.endswith(".weight") and len(shape) >= 2
    ]


def test_kohyas_722_layers_are_722_parameters(table: Slots, manifest: Manifest, released: Shapes) -> None:
    """By the block names of the original and by those of diffusers, from the published files."""
    prefix = "model.diffusion_model."
    ours = {name.removeprefix(prefix): shape for name, shape in released.items() if name.startswith(prefix)}
    inside = r"(transformer_blocks|proj_in|proj_out)"
    original = linear_of_transformers(ours, inside)
    diffusers = linear_of_transformers(manifest("diffusers_base_unet"), inside)
    assert len(original) == len(diffusers) == 722
    found = [
        [table["unet", layer.replace(".", "_")]["weight"].parameter for layer in layers]
        for layers in (original, diffusers)
    ]
    assert found[0] == [f"{prefix}{layer}.weight" for layer in original]
    assert len(set(found[0])) == 722
    assert set(found[1]) == set(found[0])


def test_every_layer_of_the_u_net_is_found_by_both_names(
    table: Slots, manifest: Manifest, released: Shapes
) -> None:
    theirs = manifest("diffusers_base_unet")
    for name, shape in theirs.items():
        module, _, kind = name.rpartition(".")
        slot = table["unet", module.replace(".", "_")][kind]
        assert slot.shape == shape or (*slot.shape, 1, 1) == shape or slot.shape == (*shape, 1, 1), name
    assert len(theirs) == sum(name.startswith("model.diffusion_model.") for name in released)


def test_kohyas_264_layers_of_the_text_encoders(table: Slots, manifest: Manifest) -> None:
    """72 of CLIP-L; 192 of bigG, whose query, key and value are thirds of one matrix here."""
    counts = {}
    for scope, file in (("clip_l", "diffusers_text_encoder"), ("big_g", "diffusers_text_encoder_2")):
        shapes = manifest(file)
        layers = linear_of_transformers(shapes, r"(self_attn|mlp)")
        found = [table[scope, layer.replace(".", "_")]["weight"] for layer in layers]  # type: ignore[index]
        assert [slot.shape for slot in found] == [shapes[f"{layer}.weight"] for layer in layers]
        places = {(slot.parameter, slot.source.part) for slot in found}
        assert len(places) == len(layers)
        counts[scope] = len(layers)
    assert counts == {"clip_l": 72, "big_g": 192}
    assert table["big_g", "text_projection"]["weight"].parameter.endswith("model.text_projection")


def test_the_refiner_has_its_own_list(manifest: Manifest) -> None:
    found = slots(manifest("sd_xl_refiner_1.0"), REFINER)
    for name in manifest("diffusers_refiner_unet"):
        module, _, kind = name.rpartition(".")
        assert kind in found["unet", module.replace(".", "_")], name
    assert not any(scope == "clip_l" for scope, _ in found)
    slot = found["big_g", "text_model_encoder_layers_0_mlp_fc1"]["weight"]
    assert slot.parameter.startswith("conditioner.embedders.0.model.")


# Refusals -----------------------------------------------------------------------------------------


def pair(layer: str, inputs: int, outputs: int = 320, rank: int = 8) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_down.weight": torch.zeros(rank, inputs),
        f"{layer}.lora_up.weight": torch.zeros(outputs, rank),
    }


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


ATTN = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
FOREIGN: dict[str, tuple[dict[str, Tensor], str]] = {
    "SD 1": (pair(f"lora_unet_{ATTN}", 768), "Stable Diffusion 1, rank 8, and does not fit sd_xl_base"),
    "SD 2": (pair(f"lora_unet_{ATTN}", 1024), "Stable Diffusion 2"),
    "refiner": (pair(f"lora_unet_{ATTN}", 1280, 768), "the SDXL refiner"),
    "other width": (pair(f"lora_unet_{ATTN}", 640), "a model with text features 640 wide"),
    "Flux by kohya": (pair("lora_unet_double_blocks_0_img_attn_qkv", 3072), "Flux"),
    "Flux by diffusers": (
        {
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 3072),
            "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(3072, 4),
        },
        "Flux, rank 4",
    ),
    "SD 3": (pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536), "Stable Diffusion 3"),
    "SD 1's text encoder": (pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 768), "another architecture"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_lora_for_another_architecture_is_named_and_refused(
    name: str, released: Shapes, tmp_path: Path
) -> None:
    tensors, said = FOREIGN[name]
    path = write(tmp_path / "style.safetensors", tensors)
    with pytest.raises(FileError, match=rf"style\.safetensors is a LoRA for {said}.*use one made for SDXL$"):
        fit_to(Lora(path), released, BASE, "sd_xl_base")


def test_a_base_lora_is_refused_by_the_refiner(manifest: Manifest, tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors", pair(f"lora_unet_{ATTN}", 2048, 640))
    with pytest.raises(FileError, match=r"is a LoRA for SDXL, rank 8, .* use one made for the SDXL refiner"):
        fit_to(Lora(path), manifest("sd_xl_refiner_1.0"), REFINER, "sd_xl_refiner")
    assert fit_to(Lora(path), manifest("sd_xl_base_1.0"), BASE, "base").matched == 1


def test_what_is_unmatched_is_counted_and_named(released: Shapes, tmp_path: Path) -> None:
    tensors = {
        **pair(f"lora_unet_{ATTN}", 2048, 640),
        **pair("lora_unet_down_blocks_9_nothing", 8),
        **pair("lora_unet_conv_in", 4, 321),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 1280),
        "bundle_emb.style.string_to_param": torch.zeros(2, 768),
    }
    found = fit_to(Lora(write(tmp_path / "a.safetensors", tensors)), released, BASE, "base")
    assert (found.matched, found.total) == (1, 5)
    assert set(found.unmatched) == {
        "lora_unet_down_blocks_9_nothing",
        "lora_unet_conv_in",
        "lora_unet_mid_block_attentions_0_proj_in",
        "bundle_emb.style.string_to_param",
    }


def test_nothing_matched_is_an_error(released: Shapes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pair("lora_unet_down_blocks_9_nothing", 8))
    with pytest.raises(
        FileError, match=r"none of its 1 layers is there .*\(lora_unet_down_blocks_9_nothing\)"
    ):
        fit_to(Lora(path), released, BASE, "base")


def test_a_checkpoint_is_no_lora(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.safetensors", {"model.diffusion_model.out.2.weight": torch.zeros(4, 320, 3, 3)}
    )
    with pytest.raises(FileError, match="is no LoRA: none of its 1 tensors changes a layer"):
        Lora(path)


# Merging ------------------------------------------------------------------------------------------


def small(config: ModelConfig) -> Shapes:
    from sdxl_cli.model.sdxl import SDXL

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in SDXL(config, ("unet",)).state_dict().items()}


def test_scale_0_leaves_the_weight_and_half_a_dora_is_half_the_way(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    layer, name = "lora_unet_time_embed_0", "model.diffusion_model.time_embed.0.weight"
    tensors = {key: torch.randn(value.shape) for key, value in pair(layer, 16, 64, 4).items()}
    tensors[f"{layer}.dora_scale"] = torch.rand(64, 1) + 1
    lora = fit_to(Lora(write(tmp_path / "a.safetensors", tensors)), small(small_config), small_config, "m")
    weight = torch.randn(64, 16)
    before = weight.clone()
    whole, half = (LoraMerge([WornLora(lora, scale, 0.0)])(name, weight) for scale in (1.0, 0.5))
    assert torch.equal(weight, before)
    torch.testing.assert_close(half, (whole + weight) / 2)
    assert not LoraMerge([WornLora(lora, 0.0, 1.0)]).changes(name)
    # the magnitudes are those stored
    torch.testing.assert_close(whole.norm(dim=1), tensors[f"{layer}.dora_scale"][:, 0])


def test_infinity_in_a_lora_is_told(small_config: ModelConfig, tmp_path: Path) -> None:
    tensors = pair("lora_unet_time_embed_0", 16, 64)
    tensors["lora_unet_time_embed_0.lora_up.weight"][3, 1] = float("inf")
    lora = fit_to(Lora(write(tmp_path / "a.safetensors", tensors)), small(small_config), small_config, "m")
    with pytest.raises(
        FileError, match=r"a\.safetensors: lora_unet_time_embed_0\.lora_up\.weight has NaN or infin"
    ):
        LoraMerge([WornLora(lora, 1.0, 1.0)])(
            "model.diffusion_model.time_embed.0.weight", torch.zeros(64, 16)
        )


def test_a1111s_hash_does_not_see_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tensors = pair("lora_unet_conv_in", 4)
    plain, noted, known = (
        Lora(write(tmp_path / f"{index}.safetensors", tensors, metadata))
        for index, metadata in enumerate((None, {"ss_tag": "x"}, {"sshs_model_hash": "ab" * 32}))
    )
    assert plain.sha256 != noted.sha256
    assert plain.short_hash == noted.short_hash
    assert known.short_hash == "abababababab"
