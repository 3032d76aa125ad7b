"""Loading a released-size U-Net costs neither a second copy nor time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sdxl_cli
from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.model.config import BASE
from sdxl_cli.model.sdxl import SDXL

pytestmark = pytest.mark.full_size

LOAD = """
import json, sys, time
import torch
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model

def memory():
    rows = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("Rss", "VmHWM")))
    return {name: int(value.split()[0]) << 10 for name, value in rows.items()}

path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_grad_enabled(False)
before, cpu, wall = memory(), time.process_time(), time.perf_counter()
model = load_model(locate(path, "model"), ("unet",), dtype=dtype, vae_dtype=dtype)
cpu, wall, after = time.process_time() - cpu, time.perf_counter() - wall, memory()
touched = sum(float(p.flatten()[0]) for p in model.unet.parameters())
grown = {name: after[name] - before[name] for name in after}
print(json.dumps({"cpu": cpu, "wall": wall, "count": sum(p.numel() for p in model.parameters()), **grown}))
"""


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5.1 GB of noise in the released layout; the text encoders' names make it an SDXL base."""
    torch.manual_seed(0)
    noise = (torch.randn(30_000_000) * 0.02).to(torch.bfloat16)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SDXL(BASE, ("unet",)).state_dict().items()}
    state = {name: noise[: shape.numel()].reshape(shape) for name, shape in shapes.items()}
    state["conditioner.embedders.1.model.ln_final.bias"] = noise[:1280]
    path = tmp_path_factory.mktemp("full") / "unet.safetensors"
    save_model(path, state, BASE)
    yield path
    path.unlink()


def load(path: Path, dtype: str) -> dict[str, float]:
    root = Path(sdxl_cli.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), dtype], capture_output=True, text=True, cwd=root
    )
    assert run.returncode == 0, run.stderr
    numbers: dict[str, float] = json.loads(run.stdout)
    print(dtype, numbers)
    assert numbers["count"] == 2_567_463_684
    return numbers


def test_the_right_dtype_costs_no_second_copy_and_less_than_a_second(unet_file: Path) -> None:
    assert unet_file.stat().st_size > 5_134_900_000
    numbers = load(unet_file, "bfloat16")
    assert numbers["cpu"] < 1.0
    assert numbers["RssAnon"] < 100 << 20


def test_a_cast_holds_one_stored_tensor_beside_the_result(unet_file: Path) -> None:
    numbers = load(unet_file, "float16")
    assert numbers["VmHWM"] < 1.05 * 2 * 2_567_463_684 + (200 << 20)
