"""CUDA C compiled while the program runs, by the compiler library that torch brings, and started by the driver.

No toolkit, header or compiler has to be installed. Neither library knows of torch: a tensor goes in as an address.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Library = ctypes.CDLL
Argument = int | float | torch.Tensor
"""Of a kernel: ``long long``, ``float`` or a pointer."""


class CudaError(RuntimeError):
    """Something of CUDA is not there, or refuses."""


def compiler_library() -> Library:
    """NVRTC, as torch has it.

    Raises:
        CudaError: this torch is not for CUDA, or has no NVRTC beside it.
    """
    if torch.version.cuda is None:
        raise CudaError("this torch is not built for CUDA")
    major, windows = torch.version.cuda.split(".")[0], sys.platform == "win32"
    version = "11.2" if major == "11" else major  # what it stayed at through CUDA 11
    name = f"nvrtc64_{float(version) * 10:.0f}_0.dll" if windows else f"libnvrtc.so.{version}"
    home = Path(torch.__file__).parent
    places = [home / "lib" / name, *home.parent.glob(f"nvidia/*/{'bin' if windows else 'lib'}/{name}")]
    for place in [name, *map(str, places)]:
        try:
            return Library(place)
        except OSError:
            continue
    raise CudaError(f"{name} is not installed; pip install nvidia-cuda-nvrtc brings it")


def driver_library() -> Library:
    """The driver.

    Raises:
        CudaError: there is none.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return Library(name)
    except OSError as error:
        raise CudaError(f"{name}: {error}; install NVIDIA's driver") from None


def compiled(
    source: str, architecture: str, options: Sequence[str] = (), library: Library | None = None
) -> bytes:
    """Machine code for one kind of device.

    Args:
        source: CUDA C++, which includes nothing.
        architecture: ``sm_90`` and the like.
        options: further ones for the compiler.
        library: NVRTC; by default torch's.

    Raises:
        CudaError: there is no NVRTC, or it finds fault; then the text is what it says.
    """
    nvrtc = library or compiler_library()
    program = ctypes.c_void_p()
    _compiles(
        nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    )
    try:
        given = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", *map(str.encode, options)]
        failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        if failed:
            log = _read(nvrtc, program, "ProgramLog").decode(errors="replace").strip("\0\n ")
            raise CudaError(log or _reason(nvrtc, failed))
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: Library, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _compiles(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _compiles(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw


def _compiles(nvrtc: Library, code: int) -> None:
    if code:
        raise CudaError(_reason(nvrtc, code))


def _reason(nvrtc: Library, code: int) -> str:
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}"


class Kernels:
    """The kernels of a compiled source, in the memory of the device that is current when they are loaded."""

    def __init__(self, image: bytes, stream: Callable[[], int], driver: Library | None = None) -> None:
        """Load them; not while a graph is recorded.

        Args:
            image: from :func:`compiled`.
            stream: the handle of the stream that kernels are started on.
            driver: by default this system's.

        Raises:
            CudaError: there is no driver, or it refuses.
        """
        self._driver, self._stream = driver or driver_library(), stream
        self._context, self._module = ctypes.c_void_p(), ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._runs(self._driver.cuCtxGetCurrent(ctypes.byref(self._context)))
        self._runs(self._driver.cuModuleLoadData(ctypes.byref(self._module), image))

    def launch(self, name: str, grid: tuple[int, int], block: int, arguments: Sequence[Argument]) -> None:
        """Start a kernel; it runs when the stream comes to it.

        Args:
            name: of an ``extern "C"`` kernel.
            grid: blocks, across and down.
            block: threads of each.
            arguments: as the kernel takes them, every integer as ``long long``, every fraction as ``float``.

        Raises:
            CudaError: the driver refuses.
        """
        values = [_value(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        function, stream = self._function(name), ctypes.c_void_p(self._stream())
        # another device may be current, or in a thread of its own none
        self._runs(self._driver.cuCtxPushCurrent_v2(self._context))
        try:
            self._runs(
                self._driver.cuLaunchKernel(function, *grid, 1, block, 1, 1, 0, stream, addresses, None)
            )
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            found = ctypes.c_void_p()
            self._runs(self._driver.cuModuleGetFunction(ctypes.byref(found), self._module, name.encode()))
            self._functions[name] = found
        return self._functions[name]

    def _runs(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"CUDA: {(text.value or b'error').decode()} ({code})")


def _value(argument: Argument) -> ctypes.c_void_p | ctypes.c_float | ctypes.c_longlong:
    match argument:
        case torch.Tensor():
            return ctypes.c_void_p(argument.data_ptr())
        case float():
            return ctypes.c_float(argument)
        case _:
            return ctypes.c_longlong(argument)
