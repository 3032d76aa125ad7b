"""The benchmark of kernels: all of it at small sizes on the CPU, and that it notices results that are wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TRIAL = ["--device", "cpu", "--dtype", "fp32", "--shrink", "32", "--rounds", "1"]


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    import gpu_kernels

    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", *flags])
    gpu_kernels.main()


def test_all_of_it_at_small_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    run(monkeypatch, *TRIAL, "--json", str(out))
    found = json.loads(out.read_text("utf-8"))
    ways: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        ways.setdefault((row["piece"], row["case"]), []).append(row)
    pieces = [piece for piece, _ in ways]
    assert {piece: pieces.count(piece) for piece in pieces} == {
        "norm": 12, "attention": 4, "upsample": 5, "qkv": 2, "conv": 7
    }  # fmt: skip
    for rows in ways.values():
        assert len(rows) == 2
        assert "faster_by" not in rows[0]
        assert rows[1]["faster_by"]["median"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
        assert all(0 <= row["difference"] < 1e-5 for row in rows)
    assert found["left_out"] == [{"row": "norm, fused", "why": "cpu is no NVIDIA device"}]
    table = capsys.readouterr().out
    assert all(f"**{piece}**" in table for piece in pieces)
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == len(found["rows"]) + 5


@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_a_result_that_is_wrong_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, fault: float) -> None:
    import gpu_kernels

    real = gpu_kernels.upsample_conv_subpixel
    monkeypatch.setattr(gpu_kernels, "upsample_conv_subpixel", lambda *given: real(*given) * fault)
    with pytest.raises(
        SystemExit, match=r"farther from fp32 than expected: upsample, 1280 at 2², batch 2, four of 2x2"
    ):
        run(monkeypatch, "upsample", *TRIAL)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device here; give --device cpu"):
        run(monkeypatch)


def test_a_piece_that_there_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "norms", *TRIAL)
    assert "no piece 'norms'; there are norm, attention, upsample, qkv, conv" in capsys.readouterr().err
