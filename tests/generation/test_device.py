"""Which device and which precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sdxl_kernels.processor import cpu_has_bf16, cpu_multiplies_bf16

from sdxl_cli.errors import NumericError, UsageError
from sdxl_cli.generation import device as devices
from sdxl_cli.generation.checks import FiniteWatch
from sdxl_cli.generation.device import pick_device, pick_dtype, pick_vae_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("line", "native"),
    [
        ("Features\t: fp asimd", False),
        ("Features\t: fp asimd bf16", True),
        ("model name\t: bf16", False),
    ],
)
def test_bf16_on_a_cpu_needs_its_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, native: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    for told in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert cpu_has_bf16(tmp_path / "cpuinfo") is native
        assert cpu_has_bf16(tmp_path / "not there") is False
        assert not cpu_multiplies_bf16()
        monkeypatch.setattr(torch.cpu, told, lambda: True)
        assert cpu_multiplies_bf16()
        assert cpu_has_bf16(tmp_path / "not there")


def test_auto_is_what_the_device_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "cpu_has_bf16", lambda native=native: native)
        assert pick_dtype("auto", CPU) == dtype
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert pick_dtype("auto", CUDA) == dtype
    assert pick_dtype("fp16", CUDA) == torch.float16


def test_the_autoencoder_never_runs_in_fp16_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_vae_dtype("auto", CPU) == torch.float32
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert pick_vae_dtype("auto", CUDA) == dtype
    assert pick_vae_dtype("fp32", CUDA) == torch.float32
    assert pick_vae_dtype("fp16", CUDA) == torch.float16
    with pytest.raises(UsageError, match="--vae-dtype fp32"):
        pick_vae_dtype("fp16", CPU)


def test_fp16_on_a_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match=r"slower than fp32 and overflow; use --dtype auto"):
        pick_dtype("fp16", CPU)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("CPU") == CPU
    for name in ("cuda", "cuda:3", "mps"):
        with pytest.raises(UsageError, match="use --device cpu"):
            pick_device(name)
    for name in ("gpu", "cpu:1", "", "cuda:x"):
        with pytest.raises(UsageError, match="unknown device"):
            pick_device(name)


def test_a_card_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="torch sees 2 CUDA devices"):
        pick_device("cuda:2")


def test_an_accelerator_tells_of_the_first_bad_step_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in for one: its answers cannot be read while steps go on."""
    watch = FiniteWatch(torch.float16, "--dtype")
    for step in range(3):
        watch.see(torch.zeros(2, device="meta"), f"step {step}")
    assert [stage for stage, _ in watch._seen] == ["step 0", "step 1", "step 2"]
    answers = [torch.tensor(step != 1) for step in range(3)]
    watch._seen = [(stage, answer) for (stage, _), answer in zip(watch._seen, answers, strict=True)]
    with pytest.raises(NumericError, match=r"^step 1: gave NaN or infinity in float16"):
        watch.settle()


def test_a_cpu_tells_of_a_bad_step_at_once() -> None:
    with pytest.raises(NumericError, match="step 0"):
        FiniteWatch(torch.float32, "--dtype").see(torch.tensor([float("inf")]), "step 0")
