"""``--plan``: what it says, and that it is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdxl_cli import cli
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model
from sdxl_cli.generation import weights as weights_module
from sdxl_cli.generation.memory import STRIPS_WORK, Needs, decoding_bytes, estimate, part_bytes
from sdxl_cli.generation.weights import FileWeights
from sdxl_cli.model import vae_strips
from sdxl_cli.model.live_bytes import LiveBytes

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(
    capsys: pytest.CaptureFixture[str], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Plan:
    """``sdxl generate --plan --json`` with the small base; loading anything fails."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(weights_module, "load_model", never)

    def run(*args: object) -> dict[str, Any]:
        assert cli.run([str(a) for a in ("generate", "-m", models["base"], "--plan", "--json", *args)]) == 0
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    return run


def test_bytes_alive_at_the_same_time() -> None:
    """Worked out by hand: x and its activation, then the activation and the next, the first being gone."""
    net = nn.Sequential(nn.Linear(10, 1000, bias=False), nn.ReLU(), nn.Linear(1000, 10, bias=False)).to(
        "meta"
    )
    x = torch.empty(4, 10, device="meta")
    with torch.inference_mode(), LiveBytes() as seen:
        net(x)
    assert (
        seen.peak == 2 * 4 * 1000 * 4
    )  # linear's output and relu's; the last layer's output comes when one is gone
    with torch.inference_mode(), LiveBytes() as seen:
        kept = [x + 1 for _ in range(3)]
    assert seen.peak == 3 * 4 * 10 * 4
    assert len(kept) == 3
    with torch.inference_mode(), LiveBytes() as seen:
        (x + 1).view(20, 2).t()[:1]
    assert seen.peak == 160, "a view takes nothing"
    with torch.inference_mode(), LiveBytes() as seen:
        assert x.view(20, 2).t().add_(1).shape == (2, 20)
    assert (seen.now, seen.peak) == (0, 0), "what was there before is not counted"


def test_shapes_alone_say_what_a_real_pass_takes(models: dict[str, Path]) -> None:
    """The same count, of tensors that are there; kernels that differ by device may differ by a little."""
    files = locate(str(models["base"]))
    device, kind = torch.device("cpu"), torch.float32
    model = FileWeights(files, device=device, dtype=kind, vae_dtype=kind)
    needs = estimate(files, model, size=(64, 96), batch=2, tokens=77, decodes=True)
    loaded = load_model(files, dtype=kind, vae_dtype=kind)
    with torch.inference_mode(), LiveBytes() as seen:
        loaded.vae.decode(torch.zeros(1, 4, 8, 12))
    whole = decoding_bytes(files.config, (64, 96), kind, strips=False)
    assert whole == pytest.approx(seen.peak, rel=0.05)
    with torch.inference_mode(), LiveBytes() as seen:
        vae_strips.decode(loaded.vae, torch.zeros(1, 4, 8, 12))
    assert needs.work["vae"] - STRIPS_WORK < seen.peak < needs.work["vae"]
    unet = files.config.unet
    context, vector = torch.zeros(2, 77, unet.context_dim), torch.zeros(2, unet.adm_in_channels)
    with torch.inference_mode(), LiveBytes() as seen:
        loaded.unet(torch.zeros(2, 4, 8, 12), torch.zeros(2, dtype=torch.long), context, vector)
    assert needs.work["unet"] == pytest.approx(seen.peak, rel=0.05)
    for part, module in (("unet", loaded.unet), ("vae", loaded.vae), ("text", loaded.conditioner)):
        held = sum(parameter.numel() * 4 for parameter in module.parameters())
        # a file's text encoders also hold the numbers of their 77 positions
        assert needs.weights[part] == pytest.approx(held, abs=77 * 4), part  # type: ignore[index]
    half = part_bytes(files, torch.float16, kind)
    assert (half["unet"] * 2, half["vae"]) == (needs.weights["unet"], needs.weights["vae"])


def test_parts_that_take_turns_need_the_largest_alone() -> None:
    needs = Needs({"text": 50, "unet": 100, "vae": 10}, {"unet": 20, "vae": 300})
    assert needs.peak(together=False) == 310
    assert needs.peak(together=True) == 160 + 300


def test_a_plan_says_sizes_steps_tokens_and_memory(plan: Plan, models: dict[str, Path]) -> None:
    asked = (
        "a red guitar " * 30,
        "--steps",
        10,
        "--scheduler",
        "sgm",
        "--size",
        "96x64",
        "--num-images",
        3,
        "--seed",
        5,
    )
    (found,) = plan(*asked, "--refiner", models["refiner"])["plans"]
    assert (found["pictures"], found["seeds"]) == (3, [5, 7])
    # the cut is at t = 200: sgm's ten steps are 999, 899 ... 99
    assert found["passes"] == [
        {
            "size": "96x64",
            "timesteps": {"base": [999, 899, 799, 699, 599, 499, 399, 299], "refiner": [199, 99]},
        }
    ]
    assert found["tokens"] == {"prompt": {"tokens": 90, "chunks": 2}}
    base, refiner = found["models"]
    assert (base["role"], base["file_bytes"]) == ("base", models["base"].stat().st_size)
    assert set(refiner["needs"]["weights"]) == {"text", "unet"}
    weights = [count for model in (base, refiner) for count in model["needs"]["weights"].values()]
    work = [count for model in (base, refiner) for count in model["needs"]["work"].values()]
    assert found["peak"] == sum(weights) + max(work)
    assert not Path("outputs").exists()


def test_every_job_of_a_sweep_has_a_plan(plan: Plan) -> None:
    plans = plan("x", "--sweep", "steps=2,4", "--hires-scale", 2)["plans"]
    assert [len(one["passes"][0]["timesteps"]["base"]) for one in plans] == [2, 4]
    assert [one["size"] for one in plans[0]["passes"]] == ["64x64", "128x128"]


def test_a_plan_is_a_table_for_people(capsys: pytest.CaptureFixture[str], models: dict[str, Path]) -> None:
    args = ["generate", "x", "-m", str(models["base"]), "--steps", "3", "--plan", "--scheduler", "sgm"]
    assert cli.run(args) == 0
    out = capsys.readouterr().out
    assert "64x64, 3 steps, t = 999 666 333" in out
    assert "1 tokens, 1 chunk of 75" in out
    assert "memory" in out
