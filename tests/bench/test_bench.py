"""``sdxl bench``: what is timed is the real work, and the numbers beside the times are right."""

from __future__ import annotations

import json
import mmap
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from sdxl_cli import cli
from sdxl_cli.bench import run as running
from sdxl_cli.bench.counting import count
from sdxl_cli.bench.memory import peak_memory
from sdxl_cli.bench.needs import needed_bytes
from sdxl_cli.bench.setting import BenchRequest, Silent, settle
from sdxl_cli.bench.timing import ratio, spread
from sdxl_cli.bench.weights import random_model, random_tensor
from sdxl_cli.model import config as sizes

CPU = torch.device("cpu")
TINY = ["--random-weights", "--model", "tiny", "--size", "64x64", "--repeats", "1", "--steps", "2"]


def bench(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.run(["bench", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_row_is_run_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = bench(capsys, *TINY, "--json")
    found = json.loads(out)
    rows = {row["name"]: row for row in found["rows"]}
    assert code == 0
    assert list(rows) == ["text", "unet", "decode", "encode", "image", "train"]
    for row in rows.values():
        assert not row["left_out"], row
        assert row["seconds"]["count"] == 1
        assert row["flops"] > 0
        assert row["of_ceiling"] == pytest.approx(row["rate"] / found["peak"]["float32"])
        assert row["per_second"] == pytest.approx(1 / row["seconds"]["median"])
        assert row["memory"]["most"] >= row["memory"]["own"] > 1 << 20
        assert f"{row['label']}: " in err
    parts = sum(rows[name]["flops"] for name in ("text", "unet", "unet", "decode"))
    once = (
        rows["image"]["flops"] - parts
    )  # the text's keys and values, which a step that is timed has already
    assert 0 <= once < 0.2 * parts
    assert found["machine"]["torch"] == str(torch.__version__)


def test_the_table_says_what_ran(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bench(
        capsys, "--model", "bundled", "--size", "64x64", "--only", "decode,text", "--repeats", "2"
    )
    assert code == 0
    assert "sdxl-tiny-base, 64x64, batch 1" in out
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["text", "autoencoder,"]
    assert "plain matrix products in float32" in out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--only", "unett"], 2, "did you mean unet?"),
        (["--model", "bundled", "--size", "60x64"], 2, "multiples of 8"),
        (["--repeats", "0"], 2, "--repeats 0: at least 1"),
        (["--random-weights", "--model", "bas"], 2, "did you mean base?"),
        (["--model", "none.safetensors"], 3, "none.safetensors: no such file"),
        (["--random-weights", "--model", "tiny", "--dtype", "fp16", "--device", "cpu"], 2, "--dtype fp16"),
        (["--random-weights", "--model", "refiner", "--only", "image"], 2, "a refiner makes no picture"),
    ],
)
def test_what_cannot_be_is_refused(
    args: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running, "needed_bytes", lambda name, setting: 0)
    found, _, err = bench(capsys, *args)
    assert found == code
    assert words in err


def test_what_does_not_fit_is_left_out_or_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only training needs more than is free here."""
    setting = settle(BenchRequest(model="tiny", random_weights=True, size="64x64"), Silent())
    needs = {name: needed_bytes(name, setting) for name in ("unet", "train")}
    assert needs["train"] > needs["unet"]
    monkeypatch.setattr(running, "free_bytes", lambda device: needs["train"] - 1)
    code, out, _ = bench(capsys, *TINY, "--json")
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert code == 0
    assert rows["train"]["seconds"] is None
    assert "are free" in rows["train"]["left_out"]
    assert rows["unet"]["seconds"] is not None
    code, _, err = bench(capsys, *TINY, "--only", "train")
    assert code == 5
    assert "take a smaller --size" in err


def test_training_holds_at_least_four_numbers_for_each_weight() -> None:
    setting = settle(BenchRequest(model="tiny", random_weights=True, size="64x64"), Silent())
    unet = random_model(sizes.TINY, ("unet",), torch.float32, CPU)
    weights = sum(parameter.numel() for parameter in unet.parameters())
    assert 16 * weights < needed_bytes("train", setting) < 16 * weights + (1 << 30)


def test_multiplications_are_counted_by_hand() -> None:
    linear, conv = nn.Linear(8, 16), nn.Conv2d(4, 6, 3, padding=1)
    q, k = torch.randn(1, 2, 10, 32), torch.randn(1, 2, 7, 32)
    with torch.inference_mode():
        assert count(lambda: linear(torch.zeros(5, 8))).flops == 2 * 5 * 8 * 16
        assert count(lambda: conv(torch.zeros(2, 4, 10, 12))).flops == 2 * 2 * 6 * 4 * 9 * 10 * 12
        assert count(lambda: scaled_dot_product_attention(q, k, k)).flops == 2 * 2 * 2 * 10 * 7 * 32


def test_operations_are_those_that_compute() -> None:
    x = torch.zeros(4, 6)
    work = count(lambda: (x.t()[1:].reshape(5, 4) + 1).mul_(2).sum().item())
    assert work.kinds == {"add": 1, "mul_": 1, "sum": 1, "_local_scalar_dense": 1}
    assert work.waits == 1


def test_a_peak_is_of_its_own_block() -> None:
    def use(megabytes: int) -> Any:
        # straight from the system: what the allocator has kept of earlier tests does not count
        with peak_memory(CPU) as peak, mmap.mmap(-1, megabytes << 20) as room:
            for page in range(0, len(room), mmap.PAGESIZE):
                room[page] = 1
        return peak

    large, small = use(300), use(20)
    if not large.of_run:
        pytest.skip("this system tells the peak of the whole process only")
    assert large.most - large.before == pytest.approx(300 << 20, rel=0.1)
    assert small.most - small.before < 100 << 20


def test_the_ratio_is_of_rounds_and_its_interval_holds_the_truth() -> None:
    """A machine that becomes slower halfway changes both sides of a round alike."""
    rng = random.Random(3)
    load = [1.0] * 10 + [3.0] * 10
    ours = [one * rng.gauss(1.0, 0.05) for one in load]
    theirs = [1.5 * one * rng.gauss(1.0, 0.05) for one in load]
    found = ratio(ours, theirs)
    assert found.low < 1.5 < found.high
    rounds = [their / our for our, their in zip(ours, theirs, strict=True)]
    assert found.high - found.low < (max(rounds) - min(rounds)) / 1.5
    few = ratio([1.0, 2.0, 4.0], [2.0, 2.0, 6.0])
    assert (few.median, few.low, few.high) == (1.5, 1.0, 2.0)
    assert spread([3.0, 1.0, 2.0]).median == 2.0


def test_random_weights_keep_what_goes_through_them_in_size() -> None:
    unet = random_model(sizes.TINY, ("unet",), torch.float32, CPU).unet
    x = torch.randn(1, 4, 16, 16)
    y, text = torch.randn(1, sizes.TINY.unet.adm_in_channels), torch.randn(1, 77, sizes.TINY.unet.context_dim)
    out = unet(x, torch.tensor([500]), text, y)
    assert 0.1 < float(out.std()) < 10
    again = random_tensor("out.2.weight", unet.out[2].weight.shape, torch.float32, CPU)
    assert torch.equal(
        random_tensor("model.diffusion_model.out.2.weight", unet.out[2].weight.shape, torch.float32, CPU),
        unet.out[2].weight,
    )
    assert not torch.equal(again, unet.out[2].weight)
