"""Linear layers in oneDNN's layout: the same numbers, the right layers, and only where it is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sdxl_kernels import prepacked as kernels
from sdxl_kernels.prepacked import prepack, prepacked_linear, prepacking_exists, prepacking_pays
from torch import nn

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.meminfo import total_memory
from sdxl_cli.errors import UsageError
from sdxl_cli.generation import prepacking
from sdxl_cli.generation.weights import FileWeights
from sdxl_cli.model.config import TINY
from sdxl_cli.model.prepacked import PrepackedLinear, packable, packed_bytes, prepack_linears
from sdxl_cli.model.unet import UNet
from tests.model.peers import randomize, relative, stepped

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16
onednn = pytest.mark.skipif(not prepacking_exists(), reason="this build of torch has no oneDNN")


@onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 64), (1, 4096, 64)])
def test_a_packed_layer_gives_what_the_layer_gives(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        expected = linear(x)
        assert relative(prepacked_linear(x, prepack(linear.weight), linear.bias), expected) < 1e-6
        # rows that do not lie next to each other
        apart = torch.randn(*shape[:-1], 128)[..., ::2]
        assert relative(prepacked_linear(apart, prepack(linear.weight), linear.bias), linear(apart)) < 1e-6


@onednn
@torch.inference_mode()
def test_a_packed_unet_gives_what_the_unet_gives() -> None:
    unet = UNet(TINY.unet).eval()
    randomize(unet)
    config = TINY.unet
    x, context = torch.randn(1, 4, 16, 16), torch.randn(2, 77, config.context_dim)
    times, y = torch.tensor([500, 500]), torch.randn(2, config.adm_in_channels)

    def evaluated() -> torch.Tensor:
        return stepped(unet, x, times, unet.prepare(context, y))

    expected, names, size = evaluated(), set(packable(unet)), packed_bytes(unet)
    prepack_linears(unet)
    packed = {name for name, module in unet.named_modules() if isinstance(module, PrepackedLinear)}
    assert packed == names
    assert size > 0
    assert not packable(unet)
    left = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) or "emb" in name for name in left)
    assert any(name.endswith("ff.net.0.proj") for name in packed)
    error = relative(evaluated(), expected)
    print(f"packed: {error:.1e}")
    assert error < 1e-5


@onednn
def test_the_weights_are_there_once() -> None:
    unet = UNet(TINY.unet)
    before = sum(p.numel() for p in unet.parameters())
    kept = sum(linear.weight.numel() for linear in packable(unet).values())
    prepack_linears(unet)
    assert sum(p.numel() for p in unet.parameters()) == before - kept


def said(folder: Path, total: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal: {total} kB\nMemAvailable: 1 kB\n")
    return path


def test_auto_goes_by_processor_and_by_all_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert total_memory(said(tmp_path, 1000)) == 1000 * 1024

    def auto(unet: int, device: torch.device = CPU) -> bool:
        return prepacking.prepacks("auto", lambda: unet, device, BF16, said(tmp_path, 1000))

    monkeypatch.setattr(prepacking, "prepacking_pays", lambda dtype: dtype == BF16)
    assert auto(500 * 1024)
    assert not auto(501 * 1024)
    assert not auto(1, GPU)
    assert not prepacking.prepacks("auto", lambda: 1, CPU, FP32, said(tmp_path, 1000))
    assert not prepacking.prepacks("off", lambda: 1, CPU, BF16, said(tmp_path, 1000))
    assert not prepacking.prepacks("auto", lambda: 1, CPU, BF16, tmp_path / "none")


def test_on_is_refused_where_it_cannot_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--prepack on: is for CPUs, and this runs on cuda"):
        prepacking.prepacks("on", lambda: 1, GPU, FP32)
    monkeypatch.setattr(prepacking, "cpu_multiplies_bf16", lambda: False)
    with pytest.raises(UsageError, match="no bf16 instructions; use --dtype fp32"):
        prepacking.prepacks("on", lambda: 1, CPU, BF16)
    monkeypatch.setattr(prepacking, "prepacking_exists", lambda: False)
    with pytest.raises(UsageError, match="no oneDNN"):
        prepacking.prepacks("on", lambda: 1, CPU, FP32)


@pytest.mark.parametrize(
    ("dtype", "avx512", "bf16", "vendor", "pays"),
    [
        (FP32, True, False, "AuthenticAMD", True),
        (FP32, True, True, "GenuineIntel", False),
        (FP32, False, False, "AuthenticAMD", False),
        (BF16, True, True, "GenuineIntel", True),
        (BF16, True, False, "AuthenticAMD", False),
        (torch.float64, True, True, "AuthenticAMD", False),
    ],
)
def test_where_it_is_known_to_be_faster(
    dtype: torch.dtype,
    avx512: bool,
    bf16: bool,
    vendor: str,
    pays: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(kernels, "cpu_multiplies_bf16", lambda: bf16)
    monkeypatch.setattr(kernels, "prepacking_exists", lambda: True)
    assert prepacking_pays(dtype, cpuinfo) == pays
    monkeypatch.setattr(kernels, "prepacking_exists", lambda: False)
    assert not prepacking_pays(dtype, cpuinfo)


@onednn
def test_a_model_from_a_file_is_packed_when_that_was_chosen() -> None:
    def kinds(**more: bool) -> set[type]:
        weights = FileWeights(locate("bundled"), device=CPU, dtype=FP32, vae_dtype=FP32, **more)  # type: ignore[arg-type]
        return {type(module) for module in weights.unet().modules()}

    assert PrepackedLinear in kinds(prepacks=True)
    assert PrepackedLinear not in kinds()
    # of a streamed U-Net a block's parameters come and go
    assert PrepackedLinear not in kinds(prepacks=True, streams=True)
