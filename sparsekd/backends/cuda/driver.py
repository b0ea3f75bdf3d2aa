"""The CUDA C++ kernels (csrc/cuda), launched through the driver API: for devices without Triton, and without a JIT.

``gather_gemm.fatbin`` lies beside the compiled module where nvcc was found at build time. It holds machine code for
sm_80, sm_87 and sm_90, and PTX that newer devices compile at first use. It is read when a CUDA tensor first needs it,
and the driver is asked by ctypes: ``sparsekd._C`` links nothing of CUDA, so the package imports on machines without it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = (None, "relu", "relu6", "silu")
FATBIN = "gather_gemm.fatbin"
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STEP = 32  # gathered channels of a step, at most
_GROUP = 8  # pixel tiles that go through all channels before the next ones


class NativeTile(NamedTuple):
    """SPARSEKD_TILES in csrc/cuda/gather_gemm_impl.h: pixels, output channels, threads, stages."""

    bm: int
    bn: int
    threads: int
    stages: int = 4
    bk: int = _STEP  # what ``Mask.table`` cuts the input channels into, at most

    def shared_bytes(self, bk: int) -> int:
        return max(self.stages * (self.bm + self.bn) * bk * 2, self.bm * self.bn * 4)


TILES = (NativeTile(128, 128, 256), NativeTile(128, 64, 128), NativeTile(64, 32, 128))


class Arguments(ctypes.Structure):
    """GatherGemm in csrc/cuda/gather_gemm_impl.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "values", "bias", "residual", "out", "tiles", "slots", "offsets")),
        *((name, ctypes.c_int32) for name in ("pixels", "grid_h", "grid_w", "in_h", "in_w", "in_c", "out_c")),
        *((name, ctypes.c_int32) for name in ("step_h", "step_w", "num_tiles", "pixel_tiles", "group", "lane", "bw")),
        ("activation", ctypes.c_int32),
    )


def why_not(dtype: torch.dtype = torch.float16, device: torch.device | None = None) -> str | None:
    """Why these kernels do not run here (on this dtype and device), or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}: the CUDA C++ kernels take float16 and bfloat16"
    if _fatbin() is None:
        return f"{FATBIN} was not built: nvcc was not found, or SPARSEKD_CUDA was OFF, when sparsekd was installed"
    if device is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)}: the CUDA C++ kernels take compute capability 8.0 and newer"
    return _driver()[1]


def tile_for(rows: int, pixels: int, processors: int) -> NativeTile:
    """The widest tile that is not mostly empty and leaves no processor without work; else the narrowest."""
    for tile in TILES[:-1]:
        fits = rows > tile.bn // 2
        if fits and -(-pixels // tile.bm) * -(-rows // tile.bn) >= processors:
            return tile
    return TILES[-1]


def gather_gemm(
    x: Tensor,
    values: Tensor,
    table: Any,
    tile: NativeTile,
    out: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Fill ``out`` with ``act(gather(x) @ blocks + bias + residual)``; ``x``, ``out``, ``residual`` channels_last 4-D.

    ``table`` is a forward ``StepTable`` of ``tile.bn`` rows and steps of one slot.
    """
    if out.numel() == 0:
        return out
    images, out_c, height, width = out.shape
    pixels = images * height * width
    if max(pixels, x[:1].numel()) >= 2**31:
        raise ValueError(f"sparsekd: the CUDA C++ kernels take fewer than 2^31 pixels, got {tuple(out.shape)}")
    pixel_tiles = -(-pixels // tile.bm)
    tensors = (x, values, bias, residual, out, table.tiles, table.slots, table.offsets)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    sizes = (pixels, height, width, x.shape[2], x.shape[3], x.shape[1], out_c, *stride, table.num_tiles, pixel_tiles)
    more = (_GROUP, table.lane, values.shape[2], ACTIVATIONS.index(activation))
    name = f"gather_gemm_{str(x.dtype).removeprefix('torch.')}_{tile.bm}x{tile.bn}x{table.slot}"
    launch(
        name, Arguments(*addresses, *sizes, *more), table.num_tiles * pixel_tiles, tile.threads,
        tile.shared_bytes(table.slot), x.device,
    )  # fmt: skip
    return out


def launch(
    name: str, arguments: Arguments, programs: int, threads: int, shared_bytes: int, device: torch.device
) -> None:
    """Start a kernel on the current stream of the device, which must be the current one."""
    driver, reason = _driver()
    if driver is None:
        raise RuntimeError(f"sparsekd: {name} cannot run: {reason}")
    pointers = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.pointer(arguments), ctypes.c_void_p))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    index = torch.cuda.current_device()
    _check(name, driver.cuCtxSetCurrent(context_of(index)))  # a thread that is new to CUDA has none yet
    function = function_of(name, shared_bytes, index)
    _check(name, driver.cuLaunchKernel(function, programs, 1, 1, threads, 1, 1, shared_bytes, stream, pointers, None))


@lru_cache(maxsize=1)
def _fatbin() -> Path | None:
    from ..cpu import native

    path = Path(native.__file__).with_name(FATBIN) if native is not None else None
    return path if path is not None and path.is_file() else None


@lru_cache(maxsize=1)
def _driver() -> tuple[Any, str | None]:
    try:
        return ctypes.CDLL("libcuda.so.1"), None
    except OSError as error:
        return None, f"no CUDA driver ({error})"


@lru_cache(maxsize=16)
def context_of(index: int) -> ctypes.c_void_p:
    """The primary context of a device: the one torch uses."""
    driver, device, context = _driver()[0], ctypes.c_int(), ctypes.c_void_p()
    _check("cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), index))
    _check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    return context


@lru_cache(maxsize=16)
def module_of(device: int) -> ctypes.c_void_p:
    """The kernels in the current context, torch's own of that device."""
    path, module = _fatbin(), ctypes.c_void_p()
    assert path is not None  # why_not said so
    _check(FATBIN, _driver()[0].cuModuleLoadData(ctypes.byref(module), path.read_bytes()))
    return module


@lru_cache(maxsize=256)
def function_of(name: str, shared_bytes: int, device: int) -> ctypes.c_void_p:
    driver, function = _driver()[0], ctypes.c_void_p()
    _check(name, driver.cuModuleGetFunction(ctypes.byref(function), module_of(device), name.encode()))
    _check(name, driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes))
    return function


def _check(what: str, code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver()[0].cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"sparsekd: {what}: the CUDA driver says {(text.value or b'?').decode()} ({code})")
