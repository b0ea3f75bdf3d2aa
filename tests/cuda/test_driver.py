"""The CUDA C++ kernels without a GPU: the same source runs on the CPU, thread by thread, against float64; nvcc compiles
it for three devices, and the machine code is looked at."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from sparsekd import BlockPattern
from sparsekd.backends import cuda as backend
from sparsekd.backends.cuda import choose, driver, masks, ops

from ..cases import CONVS, LINEARS, Conv, Linear, random_weight, tensor_core_case

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
GPU = torch.cuda.is_available()
HALVES = [torch.float16, torch.bfloat16]
CONV_CASES = [tensor_core_case(case) for case in CONVS if case.id not in ("depthwise", "1x1-block", "4x4", "8x1")]
CASES = CONV_CASES + [tensor_core_case(case) for case in LINEARS]


def no_triton(monkeypatch):
    for module in (choose, ops, backend):
        monkeypatch.setattr(module, "uses_triton", lambda: False)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """csrc/cuda/emulated.cpp as a library."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler: nothing to emulate the kernels with")
    library = tmp_path_factory.mktemp("emulation") / "emulated.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, SOURCES / "emulated.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def launches(emulation, monkeypatch):
    """CPU tensors take the CUDA C++ path, whose launches the emulation runs; yields what was launched."""
    launched = []

    def launch(name, arguments, programs, threads, shared_bytes, device):
        dtype, *tile = re.fullmatch(r"gather_gemm_(b?float16)_(\d+)x(\d+)x(\d+)", name).groups()
        assert programs == arguments.num_tiles * arguments.pixel_tiles
        status = emulation.emulate_gather_gemm(ctypes.byref(arguments), dtype == "bfloat16", *map(int, tile))
        assert status == 0, f"no kernel {name}"
        launched.append((name, threads, shared_bytes))

    monkeypatch.setattr(driver, "launch", launch)
    monkeypatch.setattr(driver, "_fatbin", lambda: SOURCES)
    monkeypatch.setattr(driver, "_driver", lambda: (None, None))
    no_triton(monkeypatch)
    masks.masks.clear()
    return launched


def run(case, dtype, *, residual=False, activation=None, first=None, device="cpu"):
    """(got, exact, torch's own) of a forward pass with bias; ``first`` replaces the first input."""
    blocks, _ = random_weight(case)
    values, index = blocks.values.to(device, dtype), (blocks.row_ptr.to(device), blocks.col_idx.to(device))
    shape = (case.n, case.c, *case.image) if isinstance(case, Conv) else (*case.batch, case.inputs)
    x, bias = (torch.randn(size).to(device, dtype) for size in (shape, case.weight_shape[:1]))
    dense = replace(blocks, values=values, row_ptr=index[0], col_idx=index[1]).to_dense()
    if first is not None:
        x.view(-1)[0] = first

    def torchs(kind):
        operands = [t.to(kind) for t in (x, dense, bias)]
        y = F.linear(*operands) if isinstance(case, Linear) else F.conv2d(*operands, **case.geometry)
        return ops.ACTIVATIONS[activation](y + added.to(kind) if residual else y)

    added = torch.zeros((), device=device)
    added = torch.randn(torchs(torch.float32).shape).to(device, dtype)
    fused = {"residual": added if residual else None, "activation": activation}
    weight = (values, *index, bias, case.weight_shape[0])
    if isinstance(case, Linear):
        return backend.linear(x, *weight, **fused), torchs(torch.float64), torchs(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (case.kernel, case.stride, case.padding, case.dilation, case.groups)
    return backend.conv2d(x, *weight, *geometry, **fused), torchs(torch.float64), torchs(dtype)


def assert_as_exact_as_torch(got, exact, peer):
    assert got.shape == exact.shape and got.dtype == peer.dtype
    if got.numel():
        error, peers = ((t.double() - exact).abs().max().item() for t in (got, peer))
        assert error <= 2 * peers + 1e-6


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_every_case(case, launches):
    for dtype in HALVES:
        assert_as_exact_as_torch(*run(case, dtype))


@pytest.mark.parametrize("tile", driver.TILES, ids=lambda tile: f"{tile.bm}x{tile.bn}")
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
def test_every_tile_and_epilogue(tile, width, activation, launches, monkeypatch):
    """More pixels and channels than a tile, walks longer than the ring of stages, and a NaN that comes through."""
    monkeypatch.setattr(driver, "tile_for", lambda *sizes: tile)
    case = Conv("tile", n=1, c=128, k=144, image=(13, 11), pattern=BlockPattern(16, width), density=0.1)
    assert_as_exact_as_torch(*run(case, torch.float16, residual=True, activation=activation))
    step = min(width, 32)
    assert launches == [
        (f"gather_gemm_float16_{tile.bm}x{tile.bn}x{step}", tile.threads, tile.shared_bytes(step)),
    ]


def test_a_nan_comes_through(launches):
    case = Linear("nan", batch=(3,), inputs=16, outputs=16, pattern=BlockPattern(16, 16), density=1.0)
    for activation in ("relu", "relu6", "silu"):
        got, *_ = run(case, torch.bfloat16, activation=activation, first=float("nan"))
        assert got.isnan().any(1).tolist() == [True, False, False]


BARRIERS = [
    number
    for number, line in enumerate((SOURCES / "gather_gemm_impl.h").read_text().splitlines(), 1)
    if "block.sync();" in line
]


@pytest.mark.parametrize("line", BARRIERS)
def test_a_barrier_that_is_missing_shows(line, launches, emulation, monkeypatch):
    """The warps of a block run in an order of their own: without any one of the barriers the result is wrong."""
    monkeypatch.setattr(driver, "tile_for", lambda *sizes: driver.TILES[0])
    case = Conv("barriers", n=1, c=128, k=144, image=(13, 11), pattern=BlockPattern(16, 16), density=0.3)
    assert_as_exact_as_torch(*run(case, torch.float16))
    emulation.emulate_without_barrier(line)
    try:
        got, exact, _ = run(case, torch.float16)
    finally:
        emulation.emulate_without_barrier(0)
    assert len(BARRIERS) == 3 and not (got.double() - exact).abs().max() < 0.1


def test_tiles_follow_the_layer():
    wide, middle, narrow = driver.TILES
    assert driver.tile_for(256, 50_000, 132) is wide
    assert driver.tile_for(64, 50_000, 16) is middle
    assert driver.tile_for(256, 49, 16) is narrow


def test_what_has_no_kernel_says_so(launches):
    case = tensor_core_case(Conv("double"))
    got, exact, _ = run(case, torch.float64)
    torch.testing.assert_close(got, exact)
    assert not launches and "float64" in driver.why_not(torch.float64)
    assert "CUDA C++ for float16" in backend.describe("conv2d")
    assert "the weight made dense" in backend.describe("linear_grad_values")


@pytest.mark.skipif(GPU, reason="there is a CUDA driver here")
def test_without_a_driver_a_launch_says_so(monkeypatch):
    assert re.search("was not built|no CUDA driver", driver.why_not())
    with pytest.raises(RuntimeError, match=r"gather_gemm cannot run: no CUDA driver"):
        driver.launch("gather_gemm", driver.Arguments(), 1, 1, 0, torch.device("cpu"))


def test_a_launch_sets_the_context_and_says_what_the_driver_says(monkeypatch):
    """The boundary to the driver: order of the calls, the grid, and its refusals by their text."""
    called = []

    class Driver:
        def __getattr__(self, name):
            def call(*arguments):
                called.append((name, *arguments))
                return refused.get(name, 0)

            return call

        def cuGetErrorString(self, code, text):
            text._obj.value = b"out of shared memory"

    refused = {}
    monkeypatch.setattr(driver, "_driver", lambda: (Driver(), None))
    monkeypatch.setattr(driver, "_fatbin", lambda: SOURCES / "gather_gemm.cu")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=77))
    for cached in (driver.context_of, driver.module_of, driver.function_of):
        cached.cache_clear()
    for _ in range(2):
        driver.launch("kernel", driver.Arguments(), 5, 128, 65536, torch.device("cpu"))
    names = [name for name, *_ in called]
    assert names == [
        *("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuModuleLoadData", "cuModuleGetFunction"),
        *("cuFuncSetAttribute", "cuLaunchKernel", "cuCtxSetCurrent", "cuLaunchKernel"),
    ]
    launched = called[-1]
    assert launched[2:9] == (5, 1, 1, 128, 1, 1, 65536) and launched[9].value == 77 and called[0][2] == 3
    refused["cuLaunchKernel"] = 1
    with pytest.raises(RuntimeError, match=r"kernel: the CUDA driver says out of shared memory \(1\)"):
        driver.launch("kernel", driver.Arguments(), 5, 128, 65536, torch.device("cpu"))
    for cached in (driver.context_of, driver.module_of, driver.function_of):
        cached.cache_clear()


def test_a_wrong_choice_of_kernels_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSEKD_CUDA", "hip")
    with pytest.raises(RuntimeError, match="must be triton or native, got 'hip'"):
        choose.uses_triton.__wrapped__()
    monkeypatch.setenv("SPARSEKD_CUDA", "native")
    assert not choose.uses_triton.__wrapped__()


@pytest.mark.parametrize("sm", [80, 87, 90])
def test_the_machine_code(sm, tmp_path):
    """No spills, two blocks a processor, tensor cores, asynchronous copies of 16 bytes, fragments by ldmatrix."""
    nvcc = shutil.which("nvcc") or pytest.skip("no nvcc here")
    triton = pytest.importorskip("triton", reason="its wheel carries cuobjdump")
    cubin = tmp_path / "gather_gemm.cubin"
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{sm}", "-Xptxas", "-v", "-cubin", "-o", cubin]
    found = subprocess.run([*command, SOURCES / "gather_gemm.cu"], capture_output=True, text=True, check=True)
    usage = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+).*?Used (\d+) registers", found.stderr, re.S
    )
    assert {name for name, *_ in usage} == {
        f"gather_gemm_{dtype}_{tile.bm}x{tile.bn}x{bk}"
        for dtype in ("float16", "bfloat16")
        for tile in driver.TILES
        for bk in (16, 32)
    }
    threads = {f"{tile.bm}x{tile.bn}": tile.threads for tile in driver.TILES}
    for name, stores, loads, registers in usage:
        assert (stores, loads) == ("0", "0"), f"{name} spills"
        assert 2 * threads["x".join(name.split("_")[-1].split("x")[:2])] * int(registers) <= 65536
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = sass.split("Function : ")[1:]
    assert len(functions) == len(usage)
    for function in functions:
        for instruction in ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4"):
            assert instruction in function, f"sm_{sm}: no {instruction} in {function.split(maxsplit=1)[0]}"


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_gpu_every_case(case, monkeypatch):
    if driver.why_not():
        pytest.skip(driver.why_not())
    no_triton(monkeypatch)
    for dtype in HALVES:
        assert_as_exact_as_torch(*run(case, dtype, residual=True, activation="silu", device="cuda"))
