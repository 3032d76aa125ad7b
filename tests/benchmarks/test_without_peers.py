"""The scripts on a machine without diffusers: ours are measured, and what is not there is said."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sdxl_cli.checkpoint.diffusers_config import unet_json, vae_json
from sdxl_cli.model.config import TINY

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
PEERS = {"diffusers", "accelerate", "bitsandbytes", "prodigyopt", "peft"}


@pytest.fixture
def without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    import rows

    find = rows.find_spec
    monkeypatch.setattr(rows, "find_spec", lambda name: None if name == "diffusers" else find(name))


def imported_at_once(tree: ast.AST) -> Iterator[str]:
    """Packages that a module imports when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield from imported_at_once(node)


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_peers_are_imported_where_they_are_run(path: Path) -> None:
    assert not PEERS & set(imported_at_once(ast.parse(path.read_text("utf-8"))))


def test_what_is_missing_in_words() -> None:
    from rows import missing

    assert missing("torch") == ""
    assert missing("torch", "no_such_package") == "no_such_package is not installed"
    assert missing("no_such_package", "nor_this") == "no_such_package and nor_this are not installed"


def test_side_by_side_is_ours_alone(
    without_diffusers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    import side_by_side

    asked: list[Any] = []

    def compare(job: Any, names: list[str], rounds: int, **more: Any) -> Any:
        asked.append((names, more["reference"]))
        raise SystemExit

    monkeypatch.setattr(side_by_side, "compare", compare)
    monkeypatch.setattr(side_by_side, "weights_of", lambda args: tmp_path)
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", "--jobs", "unet"])
    with pytest.raises(SystemExit):
        side_by_side.main()
    assert asked == [(["sdxl"], "")]
    assert "diffusers is not installed: no rows of it" in capsys.readouterr().out


def test_cold_start_is_ours_alone(
    without_diffusers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    import cold_start

    monkeypatch.setattr(cold_start, "started", lambda *given: (1.0, 1.0, 100))
    monkeypatch.setattr(cold_start, "weights_of", lambda args: tmp_path)
    monkeypatch.setattr(sys, "argv", ["cold_start.py", "--rounds", "2"])
    cold_start.main()
    said = capsys.readouterr().out
    assert "diffusers is not installed: no rows of diffusers" in said
    rows = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")]
    assert rows == ["program", "sdxl generate, first step", "sdxl --help"]


def test_a_comparison_of_nothing_ends(without_diffusers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_step

    monkeypatch.setattr(sys, "argv", ["train_step.py"])
    with pytest.raises(SystemExit, match="diffusers is not installed, and this is a comparison with it"):
        train_step.main()


def test_weights_are_written_without_diffusers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And are those that diffusers has names for."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from random_folder import write_folder

    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(unet_json(TINY)),
            "vae": AutoencoderKL.from_config(vae_json(TINY.vae, TINY.native_size)),
        }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        write_folder(tmp_path, TINY, torch.float32)
    for name, network in networks.items():
        with safe_open(tmp_path / name / "diffusion_pytorch_model.safetensors", "pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert found == {key: tuple(value.shape) for key, value in network.state_dict().items()}
