"""Whole models: written, found, read, and the same as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model, load_vae, open_tensors
from sdxl_cli.checkpoint.write import save_model, save_tensors, save_vae
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import BASE, REFINER, ModelConfig
from sdxl_cli.model.sdxl import SDXL

Build = Callable[[ModelConfig], SDXL]
F32 = torch.float32


def load(path: Path, dtype: torch.dtype = F32, **options: object) -> SDXL:
    return load_model(locate(str(path), "model"), dtype=dtype, vae_dtype=F32, **options)  # type: ignore[arg-type]


def same(ours: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = ours.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def model(random_model: Build, small_config: ModelConfig) -> SDXL:
    return random_model(small_config)


@pytest.fixture
def path(model: SDXL, tmp_path: Path) -> Path:
    file = tmp_path / "small.safetensors"
    save_model(file, model, model.config)
    return file


def test_a_model_comes_back_the_same_and_ready_to_run(model: SDXL, path: Path) -> None:
    loaded = load(path)
    assert same(loaded, model)
    assert loaded.config == model.config
    assert loaded.known_token_ids is None
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.tensor([[1, 5, 119, *[0] * 74]])
    ours, theirs = (m.conditioner.text(ids, ids) for m in (loaded, model))
    assert torch.equal(ours.crossattn, theirs.crossattn)
    assert torch.equal(ours.pooled, theirs.pooled)


def test_refiners_too(random_model: Build, small_refiner_config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(small_refiner_config)
    save_model(tmp_path / "r.safetensors", model, model.config)
    assert same(load(tmp_path / "r.safetensors"), model)


def test_parameters_are_the_files_own_pages_when_the_dtype_is_right(path: Path) -> None:
    files = locate(str(path))
    loaded = load_model(files, dtype=F32, vae_dtype=F32)
    storages = {parameter.untyped_storage().data_ptr() for parameter in loaded.unet.parameters()}
    begin, end = min(storages), max(storages)
    assert end - begin < files.size  # all within one mapping
    cast = load_model(files, dtype=torch.bfloat16, vae_dtype=F32)
    assert {parameter.dtype for parameter in cast.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in cast.conditioner.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in cast.vae.parameters()} == {F32}


def test_parts_are_loaded_alone(model: SDXL, path: Path) -> None:
    assert load(path, parts=("unet",)).parts == ("unet",)
    assert same(load(path, parts=("text",)).conditioner, model.conditioner)
    assert same(load_vae(locate(str(path), "vae"), dtype=F32), model.vae)


def test_the_single_file_has_the_released_names(path: Path, model: SDXL) -> None:
    with safetensors.safe_open(path, "pt") as file:
        names, notes = set(file.keys()), file.metadata()
        ids = file.get_tensor("conditioner.embedders.0.transformer.text_model.embeddings.position_ids")
    assert names == set(model.state_dict()) | {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    }
    assert torch.equal(ids, torch.arange(77)[None])
    assert notes["modelspec.sai_model_spec"] == "1.0.1"
    assert notes["modelspec.architecture"] == "stable-diffusion-xl-v1-base/other-size"
    assert notes["modelspec.title"] == "small"
    assert notes["modelspec.resolution"] == "64x64"
    assert notes["modelspec.prediction_type"] == "epsilon"
    assert ModelConfig.from_dict(json.loads(notes["sdxl.config"])) == model.config


@pytest.mark.parametrize(
    ("config", "architecture"),
    [(BASE, "stable-diffusion-xl-v1-base"), (REFINER, "stable-diffusion-xl-v1-refiner")],
    ids=["base", "refiner"],
)
def test_released_sizes_need_no_config(config: ModelConfig, architecture: str, tmp_path: Path) -> None:
    unet_bias = {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    save_model(
        tmp_path / "x.safetensors", unet_bias, config, metadata={"modelspec.author": "me"}, prediction="v"
    )
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        notes = file.metadata()
    assert notes["modelspec.architecture"] == architecture
    assert notes["modelspec.author"] == "me"
    assert notes["modelspec.prediction_type"] == "v"
    assert notes.get("modelspec.timestep_range") == ("0,199" if config is REFINER else None)
    assert "sdxl.config" not in notes


def test_the_prediction_type_comes_back(model: SDXL, tmp_path: Path) -> None:
    save_model(tmp_path / "v.safetensors", model, model.config, prediction="v")
    assert locate(str(tmp_path / "v.safetensors")).prediction == "v"


def test_half_precision_files_are_cast_back(model: SDXL, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_model(path, model, model.config, dtype=torch.float16)
    loaded = load(path).state_dict()
    assert all(
        torch.equal(loaded[name], tensor.half().float()) for name, tensor in model.state_dict().items()
    )


def test_a_vae_alone(model: SDXL, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_vae(path, model.vae, model.config.vae)
    assert set(safetensors.torch.load_file(path)) == set(model.vae.state_dict())
    files = locate(str(path), "vae")
    assert files.config.vae == model.config.vae
    assert same(load_vae(files, dtype=F32), model.vae)


def test_another_vae_takes_the_place_of_a_models_own(
    model: SDXL, path: Path, tmp_path: Path, random_model: Build
) -> None:
    config = replace(model.config.vae, channels=8, scale_factor=0.9)
    vae = random_model(replace(model.config, vae=config)).vae
    save_vae(tmp_path / "vae.safetensors", vae, config)
    files = locate(str(path)).with_vae(locate(str(tmp_path / "vae.safetensors"), "vae"))
    loaded = load_model(files, dtype=F32, vae_dtype=F32)
    assert same(loaded.vae, vae)
    assert loaded.vae.config.scale_factor == 0.9
    assert same(loaded.unet, model.unet)


def without(path: Path, *names: str, **added: torch.Tensor) -> Path:
    """A copy of a file with some tensors taken away and others put in."""
    with safetensors.safe_open(path, "pt") as file:
        notes = file.metadata()
    tensors = {
        name: tensor for name, tensor in safetensors.torch.load_file(path).items() if name not in names
    }
    changed = path.with_name("changed.safetensors")
    save_tensors(changed, tensors | added, notes)
    return changed


OUT = "model.diffusion_model.out.2"


def test_missing_unexpected_and_mis_shaped_tensors_are_named(path: Path) -> None:
    with pytest.raises(
        FileError, match=rf"changed.* does not fit an SDXL base model: 1 missing: {OUT}\.bias$"
    ):
        load(without(path, f"{OUT}.bias"))
    with pytest.raises(FileError, match=r"1 unexpected: model\.diffusion_model\.extra$"):
        load(without(path, **{"model.diffusion_model.extra": torch.zeros(1)}))
    with pytest.raises(FileError, match=rf"1 mis-shaped: {OUT}\.bias \[3\] instead of \[4\]$"):
        load(without(path, **{f"{OUT}.bias": torch.zeros(3)}))


def test_damage_in_one_part_does_not_stop_another(path: Path, model: SDXL) -> None:
    broken = without(path, f"{OUT}.bias")
    assert same(load(broken, parts=("vae",)).vae, model.vae)


def test_what_fine_tunes_drop_or_add_is_tolerated(path: Path, model: SDXL) -> None:
    changed = without(
        path,
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
        **{
            "denoiser.sigmas": torch.zeros(1000),
            "model_ema.decay": torch.tensor(0.9),
            "v_pred": torch.empty(0),
        },
    )
    loaded = load(changed)
    assert same(loaded.unet, model.unet)
    assert locate(str(changed)).prediction == "v"


def test_vae_attention_stored_as_linear_layers_is_read(path: Path, model: SDXL) -> None:
    squeezed = {
        f"first_stage_model.{name}": tensor[:, :, 0, 0].clone()
        for name, tensor in model.vae.state_dict().items()
        if ".attn_1." in name and tensor.ndim == 4
    }
    assert len(squeezed) == 8
    assert same(load(without(path, **squeezed)).vae, model.vae)


def test_a_pruned_vocabulary_comes_back_in_full(model: SDXL, tmp_path: Path) -> None:
    path, kept = tmp_path / "pruned.safetensors", [119, 3, 0, 118, 3]
    save_model(path, model, model.config, keep_token_ids=kept)
    stored = safetensors.torch.load_file(path)
    assert stored["sdxl.token_ids"].tolist() == [0, 3, 118, 119]
    loaded = load(path)
    assert loaded.known_token_ids == {0, 3, 118, 119}
    tables = {
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": 120,
        "conditioner.embedders.1.model.token_embedding.weight": 120,
    }
    before, after = model.state_dict(), loaded.state_dict()
    for name, rows in tables.items():
        assert stored[name].shape[0] == 5
        assert after[name].shape[0] == rows
        assert torch.equal(after[name][[0, 3, 118, 119]], before[name][[0, 3, 118, 119]])
        mean = before[name][[0, 3, 118, 119]].mean(dim=0)
        assert torch.allclose(after[name][[1, 2, 50, 117]], mean.expand(4, -1), atol=1e-7)
    assert load(path, parts=("unet",)).known_token_ids is None


def test_saving_a_pruned_model_again_changes_nothing(model: SDXL, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_model(first, model, model.config, keep_token_ids=range(0, 120, 7), dtype=torch.float16)
    save_model(second, load(first), model.config, dtype=torch.float16)
    a, b = (safetensors.torch.load_file(file) for file in (first, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_token_ids_that_do_not_fit_are_damage(model: SDXL, tmp_path: Path) -> None:
    path = tmp_path / "pruned.safetensors"
    save_model(path, model, model.config, keep_token_ids=[1, 2, 3])
    for ids in ([1, 2], [1, 2, 500]):
        with pytest.raises(FileError, match=r"sdxl\.token_ids .* the file is damaged"):
            load(without(path, **{"sdxl.token_ids": torch.tensor(ids)}))


def test_saving_over_the_file_a_model_came_from(model: SDXL, path: Path) -> None:
    loaded = load(path)
    save_model(path, loaded, loaded.config)
    assert same(load(path), model)
    assert same(loaded, model)


def test_same_model_same_bytes(model: SDXL, tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "m.safetensors", tmp_path / "b" / "m.safetensors"]
    for path in paths:
        save_model(path, model, model.config, metadata={"modelspec.date": "2024-01-01"})
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_open_tensors_reads_single_values_of_a_model(path: Path, model: SDXL) -> None:
    tensors = open_tensors(locate(str(path)))
    assert torch.equal(tensors.read(f"{OUT}.bias"), model.unet.out[2].bias)
