"""Models stored in eight bits per number, with and without scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.opening import open_files
from sdxl_cli.checkpoint.read import load_model
from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import ModelConfig
from sdxl_cli.model.sdxl import SDXL

Build = Callable[[ModelConfig], SDXL]
UNET = "model.diffusion_model."
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize("stored", [E4M3, E5M2])
@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_in_fp8_is_cast_to_the_dtype_it_runs_in(
    stored: torch.dtype, run: torch.dtype, random_model: Build, small_config: ModelConfig, tmp_path: Path
) -> None:
    model, path = random_model(small_config), tmp_path / "fp8.safetensors"
    save_model(path, model, small_config, dtype=stored)
    loaded = load_model(locate(str(path)), dtype=run, vae_dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        expected = model.state_dict()[name].to(stored).float()
        assert tensor.dtype == (torch.float32 if name.startswith("first_stage_model.") else run)
        assert torch.equal(tensor.float(), expected)


def scaled(weight: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """The largest magnitude becomes fp8's largest, 448."""
    largest = (
        weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True) if per_row else weight.abs().max()
    )
    scale = (largest / 448).float()
    return (weight / scale).to(E4M3), scale.reshape(-1) if per_row else scale


@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_weights_are_multiplied_with_their_scale(
    names: tuple[str, str], per_row: bool, random_model: Build, small_config: ModelConfig, tmp_path: Path
) -> None:
    model, path = random_model(small_config), tmp_path / "scaled.safetensors"
    save_model(path, model, small_config)
    state = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        notes = file.metadata()
    linears = [n for n, t in state.items() if n.startswith(UNET) and n.endswith(".weight") and t.ndim == 2]
    for name in linears:
        base = name.removesuffix(".weight")
        state[name], state[f"{base}.{names[0]}"] = scaled(state[name] * 1e-4, per_row)
        state[f"{base}.{names[1]}"] = torch.ones(())
    state[f"{UNET}scaled_fp8"] = torch.empty(2, dtype=E4M3)
    safetensors.torch.save_file(state, path, notes)
    loaded = load_model(locate(str(path)), dtype=torch.float32, vae_dtype=torch.float32).state_dict()
    assert len(linears) > 10
    for name, tensor in model.state_dict().items():
        if name in linears:
            # three bits of mantissa: half a step is 1/16 of the number; without the scale it would be off by 1e4
            error = (loaded[name] - tensor * 1e-4).norm() / (tensor * 1e-4).norm()
            assert error < 0.04
        else:
            assert torch.equal(loaded[name], tensor)


def test_a_scale_of_the_wrong_size_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(
        {"a.weight": torch.zeros(4, 4).to(E4M3), "a.scale_weight": torch.ones(3)}, path
    )
    with pytest.raises(FileError, match=r"a\.scale_weight has 3 elements, .* takes 1 or 4"):
        open_files([path])


def test_a_scale_beside_a_weight_that_is_not_fp8_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a.weight": torch.ones(4, 4), "a.scale_weight": torch.full((1,), 9.0)}, path)
    tensors = open_files([path])
    assert set(tensors.shapes) == {"a.weight", "a.scale_weight"}
    assert torch.equal(tensors.read("a.weight"), torch.ones(4, 4))
