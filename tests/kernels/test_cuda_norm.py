"""The CUDA source of the fused group norm: NVRTC compiles it, and run on a CPU it is the formula."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sdxl_kernels import cuda_norm
from sdxl_kernels import nvrtc as nvrtc_module
from sdxl_kernels.cuda_norm import KINDS, SOURCE, TOLERANCES, FusedNorm, deviation, divided, options
from sdxl_kernels.normalization import group_norm, group_norm_silu
from sdxl_kernels.nvrtc import CudaError, Kernels, compiled, compiler_library
from torch import Tensor

NAMES = [
    f"{name}_{width}" for name in ("count", "normalize", "normalize_silu") for width in ("wide", "single")
]
DTYPES = pytest.mark.parametrize("dtype", KINDS, ids=str)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def nvrtc() -> ctypes.CDLL:
    try:
        return compiler_library()
    except CudaError as error:
        pytest.skip(str(error))


@DTYPES
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_compiler_takes_the_source(dtype: torch.dtype, architecture: str) -> None:
    image = compiled(SOURCE.read_text("utf-8"), architecture, options(dtype), nvrtc())
    assert image.startswith(b"\x7fELF")
    assert all(name.encode() in image for name in NAMES)


def test_what_the_compiler_finds_fault_with_is_said() -> None:
    with pytest.raises(CudaError, match='identifier "nothing" is undefined'):
        compiled('extern "C" __global__ void f(float* x) { *x = nothing; }', "sm_80", library=nvrtc())


class Emulator:
    """Kernels on the CPU, by dtype."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._built: dict[torch.dtype, FusedNorm] = {}

    def __call__(self, dtype: torch.dtype) -> FusedNorm:
        if dtype not in self._built:
            self._built[dtype] = FusedNorm(
                Kernels(b"", lambda: 0, ctypes.CDLL(str(self._build(dtype)))), dtype
            )
        return self._built[dtype]

    def _build(self, dtype: torch.dtype) -> Path:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("g++ is not installed")
        library = self._folder / f"{KINDS[dtype]}.so"
        told = [
            f'-DSOURCE="{SOURCE}"',
            "-DKERNELS=" + " ".join(f"ADD({name})" for name in NAMES),
            *options(dtype),
        ]
        shim = Path(__file__).with_name("cuda_on_cpu.cpp")
        flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC"]
        made = subprocess.run(
            [compiler, *flags, *told, str(shim), "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode and "_Float16" in made.stderr:
            pytest.skip("this g++ has no half precision")
        assert made.returncode == 0, made.stderr
        return library


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def _available(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device."""
    monkeypatch.setattr(cuda_norm, "ready", lambda device, dtype: emulator(dtype))
    monkeypatch.setattr(cuda_norm, "WANTED", (torch.float32,))


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, mean: float = 0.0, std: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = (mean + std * torch.randn(shape)).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)


def errors(fused: FusedNorm, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> list[float]:
    """Of both kernels, against double precision, as a part of the largest number."""
    exact = F.group_norm(x.double(), groups, weight.double(), bias.double(), eps)
    width, found = fused.width(x, groups, weight, bias), []
    for silu, expected in ((False, exact), (True, F.silu(exact))):
        made = fused(x, groups, weight, bias, eps, width=width, silu=silu)
        assert made.is_contiguous(memory_format=torch.channels_last)
        found.append(float((made.double() - expected).abs().max() / expected.abs().max()))
    return found


SHAPES = {
    "groups of 10": ((2, 320, 7, 9), 32),
    "groups of 20": ((2, 640, 5, 3), 32),
    "groups of 40": ((1, 1280, 4, 4), 32),
    "groups of 80": ((2, 2560, 3, 3), 32),
    "the VAE's groups of 4, in several parts": ((1, 128, 33, 35), 32),
    "one pixel": ((2, 32, 1, 1), 8),
    "an odd number of channels": ((2, 7, 5, 5), 7),
    "one group": ((3, 12, 9, 11), 1),
}


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_formula(emulator: Emulator, name: str, dtype: torch.dtype) -> None:
    shape, groups = SHAPES[name]
    x, weight, bias = problem(shape, dtype)
    assert max(errors(emulator(dtype), x, groups, weight, bias, 1e-5)) < TOLERANCES[dtype]


def test_what_is_added_to_the_variance(emulator: Emulator) -> None:
    x, weight, bias = problem((1, 32, 7, 5), torch.float32, 0.0, 1e-2)
    assert max(errors(emulator(torch.float32), x, 8, weight, bias, 1e-3)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    ("dtype", "mean", "bound"),
    [(torch.float32, 1e3, 1e-4), (torch.float32, -1e4, 1e-3), (torch.bfloat16, 20.0, 5e-3)],
)
def test_a_mean_that_is_large_beside_the_deviation(
    emulator: Emulator, dtype: torch.dtype, mean: float, bound: float
) -> None:
    """Sums of squares would leave nothing of a variance of 1 beside a mean of 10,000."""
    x, weight, bias = problem((2, 64, 31, 17), dtype, mean)
    assert max(errors(emulator(dtype), x, 16, weight, bias, 1e-5)) < bound


def test_parts_of_different_means(emulator: Emulator) -> None:
    """One half black, one half white, and a row of outliers at the start of every part."""
    x, weight, bias = problem((1, 32, 64, 65), torch.float32)
    x[:, :, :32] += 500
    x[:, :, ::8] *= 50
    assert max(errors(emulator(torch.float32), x, 8, weight, bias, 1e-6)) < TOLERANCES[torch.float32]


def test_a_constant_image_is_its_bias(emulator: Emulator) -> None:
    x, weight, bias = problem((1, 32, 9, 9), torch.float32, 3.7, 0.0)
    fused = emulator(torch.float32)
    made = fused(x, 8, weight, bias, 1e-6, width=4, silu=False)
    assert torch.equal(made, bias[None, :, None, None].expand_as(made))


def test_nan_stays_in_its_group(emulator: Emulator) -> None:
    x, weight, bias = problem((2, 32, 9, 9), torch.float32)
    x[1, 9, 8, 8] = float("nan")
    bad = emulator(torch.float32)(x, 8, weight, bias, 1e-6, width=4, silu=True).isnan()
    assert bad[1, 8:12].all()
    assert bad.sum() == 4 * 81


@DTYPES
def test_threads_wait_for_each_other(
    emulator: Emulator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order they run, the result has the same bits; and it is the same each time."""
    x, weight, bias = problem((2, 320, 7, 9), dtype)
    made = [emulator(dtype)(x, 32, weight, bias, 1e-5, width=16 // x.itemsize, silu=True) for _ in range(2)]
    monkeypatch.setenv("BACKWARDS", "1")
    made.append(emulator(dtype)(x, 32, weight, bias, 1e-5, width=16 // x.itemsize, silu=True))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("images", [1, 2, 8, 1000])
@pytest.mark.parametrize("pixels", [1, 77, 16**2, 128**2, 2048**2])
@pytest.mark.parametrize(
    ("channels", "width"), [(320, 8), (1280, 8), (2560, 4), (4096, 4), (128, 8), (7, 1), (1000, 1)]
)
def test_work_is_divided_without_rest(images: int, pixels: int, channels: int, width: int) -> None:
    work = divided(images, pixels, channels, width)
    assert work.rows * channels // width <= work.threads <= cuda_norm.MOST_THREADS
    assert work.rows * channels <= cuda_norm.MOST_CHANNELS, "what a block shares"
    assert work.threads % 32 == 0
    for size, many in ((work.part, work.parts), (work.block, work.blocks)):
        assert (many - 1) * size < pixels <= many * size
        assert size < 1 << 31
    assert work.parts * images <= max(cuda_norm.PARTS, images)


def test_what_it_does_not_take(emulator: Emulator) -> None:
    fused = emulator(torch.float32)
    for x, groups, weight in (
        (torch.zeros(1, 8192, 1, 1), 32, torch.zeros(8192)),
        (torch.zeros(1, 1026, 2, 2), 2, torch.zeros(1026)),
        (torch.zeros(1, 512, 2, 2), 512, torch.zeros(512)),
        (torch.zeros(1, 8, 0, 2), 2, torch.zeros(8)),
        (torch.zeros(1, 8, 2, 2), 2, torch.zeros(8, dtype=torch.bfloat16)),
        (torch.zeros(1, 8, 2, 2, dtype=torch.bfloat16), 2, torch.zeros(8)),
        (torch.zeros(1, 8, 2, 2), 2, torch.zeros(16)[::2]),
    ):
        assert fused.width(x, groups, weight, weight) == 0
    assert fused.width(torch.zeros(1, 8, 2, 2), 2, torch.zeros(8), torch.zeros(8)) == 4
    assert fused.width(torch.zeros(33)[1:].view(1, 8, 2, 2), 2, torch.zeros(8), torch.zeros(8)) == 1, (
        "misaligned"
    )


@pytest.mark.usefixtures("_available")
def test_channels_last_is_normalised_by_it_and_stays() -> None:
    x, weight, bias = problem((2, 32, 5, 7), torch.float32)
    with torch.no_grad():
        plain, activated = group_norm(x, 8, weight, bias, 1e-5), group_norm_silu(x, 8, weight, bias, 1e-5)
    double = F.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-5)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(plain.double(), double, atol=1e-5)
    assert torch.allclose(activated.double(), F.silu(double), atol=1e-5)


@pytest.fixture
def _refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError("these kernels are not for it")

    monkeypatch.setattr(FusedNorm, "__call__", never)


@pytest.mark.usefixtures("_available", "_refused")
def test_whoever_trains_or_has_channels_first_or_single_precision_gets_torchs_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight, bias = problem((2, 32, 5, 7), torch.float32)
    group_norm_silu(x, 8, weight, bias.requires_grad_(), 1e-5).sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        group_norm(x.contiguous(), 8, weight, bias, 1e-5)
        with pytest.raises(AssertionError, match="not for it"):
            group_norm(x, 8, weight, bias, 1e-5)

        monkeypatch.setattr(cuda_norm, "WANTED", (torch.bfloat16,))
        group_norm(x, 8, weight, bias, 1e-5)


@pytest.fixture
def _pretended(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device, which is the CPU."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda_norm, "load", lambda device, dtype: emulator(dtype))
    monkeypatch.setattr(cuda_norm, "SHAPES", ((2, 320, 3, 5), (1, 128, 7, 23)))
    monkeypatch.setattr(cuda_norm, "deviation", lambda fused, device: deviation(fused, CPU))


@pytest.mark.usefixtures("_pretended")
def test_kernels_are_used_when_they_compute_what_torch_does(emulator: Emulator) -> None:
    assert cuda_norm.ready.__wrapped__(CUDA, torch.bfloat16) is emulator(torch.bfloat16)
    assert cuda_norm.ready.__wrapped__(CUDA, torch.float64) == "there is none for torch.float64"


@pytest.mark.usefixtures("_pretended")
@pytest.mark.parametrize("fault", [1.02, float("nan")])
def test_kernels_that_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, fault: float
) -> None:
    real = FusedNorm.__call__
    monkeypatch.setattr(FusedNorm, "__call__", lambda *args, **kinds: real(*args, **kinds) * fault)
    with pytest.warns(UserWarning, match=r"not used on cuda in torch\.bfloat16: its results differ"):
        found = cuda_norm.ready.__wrapped__(CUDA, torch.bfloat16)
    assert str(found).startswith("its results differ from torch's by")


def test_why_there_are_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device, dtype: torch.dtype) -> FusedNorm:
        raise CudaError("libnvrtc.so.13 is not installed")

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda_norm, "load", missing)
    assert cuda_norm.ready.__wrapped__(CUDA, torch.float32) == "libnvrtc.so.13 is not installed"


def test_a_torch_without_cuda_has_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(CudaError, match="not built for CUDA"):
        compiler_library()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    with pytest.raises(CudaError, match=r"99.* is not installed; pip install nvidia-cuda-nvrtc"):
        compiler_library()


@pytest.mark.parametrize(
    ("platform", "version", "name"),
    [
        ("linux", "11.8", "libnvrtc.so.11.2"),
        ("linux", "12.6", "libnvrtc.so.12"),
        ("linux", "13.2", "libnvrtc.so.13"),
        ("win32", "11.8", "nvrtc64_112_0.dll"),
        ("win32", "12.6", "nvrtc64_120_0.dll"),
    ],
)
def test_what_the_compiler_is_called(
    platform: str, version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def missing(place: str) -> None:
        asked.append(place)
        raise OSError(place)

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(nvrtc_module, "Library", missing)
    with pytest.raises(CudaError, match=name.replace(".", r"\.") + " is not installed"):
        compiler_library()
    assert asked[0] == name
    assert all(Path(place).name == name for place in asked)


def test_a_computer_without_a_gpu_says_so() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda_norm.ready(CPU, torch.float32) == "cpu is no NVIDIA device"


def test_a_driver_that_refuses_is_an_error(emulator: Emulator) -> None:
    kernels = emulator(torch.float32)._kernels
    with pytest.raises(CudaError, match="named symbol not found"):
        kernels.launch("missing", (1, 1), 32, [])
