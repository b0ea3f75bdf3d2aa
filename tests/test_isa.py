"""Every instruction set of this CPU gives the right answer, the forced one runs, none leaks out of its file."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd import _C

from .cases import ISA_CONVS, activations64

KNOWN_ISAS = ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "neon_bf16", "neon_dotprod", "neon", "scalar")


@pytest.fixture
def isa_restored():
    before = _C.isa()
    yield
    _C.use_isa(before)


class Blocks:
    """A random block-sparse weight [k, cg, r, s] in storage form, with the dense weight it stands for."""

    def __init__(self, k, cg, r, s, bh, bw, density, seed, dead_rows=False):
        generator = torch.Generator().manual_seed(seed)
        self.bh, self.bw = bh, bw
        block_rows, block_cols = -(-k // bh), -(-cg // bw)
        mask = torch.rand(block_rows, r * s * block_cols, generator=generator) < density
        if dead_rows:
            mask[::2] = False
        index = mask.nonzero()
        self.nnzb = len(index)
        self.row_ptr = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
        self.col_idx = index[:, 1].int().contiguous()
        self.row = (index[:, 0] * bh)[:, None, None] + torch.arange(bh)[None, :, None].expand(-1, bh, bw)
        self.tap = (index[:, 1] // block_cols)[:, None, None].expand(-1, bh, bw)
        channel = (index[:, 1] % block_cols * bw)[:, None, None] + torch.arange(bw)[None, None, :]
        self.channel = channel.expand(-1, bh, bw)
        self.inside = (self.row < k) & (self.channel < cg)
        self.values = torch.randn(self.nnzb, bh, bw, generator=generator) * self.inside
        flat = torch.zeros(k, r * s, cg)
        at = (self.row[self.inside], self.tap[self.inside], self.channel[self.inside])
        flat[at] = self.values[self.inside]
        self.dense = flat.permute(0, 2, 1).reshape(k, cg, r, s)

    def gather(self, dense_gradient):
        """The gradient of the stored values, zero in the padding of ragged blocks."""
        k, cg, r, s = dense_gradient.shape
        flat = dense_gradient.reshape(k, cg, r * s).permute(0, 2, 1)
        out = torch.zeros(self.values.shape, dtype=flat.dtype)
        out[self.inside] = flat[self.row[self.inside], self.tap[self.inside], self.channel[self.inside]]
        return out

    @property
    def pointers(self):
        return self.values.data_ptr(), self.row_ptr.data_ptr(), self.col_idx.data_ptr(), self.nnzb


def unwritten(*shape, channels_last=False):
    """NaN everywhere, so that an element the kernel forgets is seen."""
    out = torch.full(shape, float("nan"))
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


# Cases whose every second row of blocks is empty.
DEAD_ROWS = ("strided", "small-blocks", "filters-whole")

conv2d_cases = pytest.mark.parametrize("case", ISA_CONVS, ids=lambda case: case.id)


def blocks_of(case, seed, pattern=None):
    pattern = pattern or (case.pattern.bh, case.pattern.bw)
    return Blocks(*case.weight_shape, *pattern, case.density, seed, dead_rows=case.id in DEAD_ROWS)


def shape_of(case, blocks):
    """The case as the kernels know it, with the blocks of a weight that may differ from the case's own."""
    sizes = (case.n, case.c, *case.image), case.k, case.kernel
    return _C.Conv2dShape(*sizes, **case.geometry, block=(blocks.bh, blocks.bw))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@conv2d_cases
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_conv2d_equals_fp64(isa, case, channels_last, threads, isa_restored):
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    blocks = blocks_of(case, seed=1)
    shape = shape_of(case, blocks)
    generator = torch.Generator().manual_seed(2)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(case.n, case.c, *case.image, generator=generator).contiguous(memory_format=memory_format)
    dy = torch.randn(case.n, case.k, shape.p, shape.q, generator=generator).contiguous(memory_format=memory_format)
    bias = torch.randn(case.k, generator=generator)
    residual = torch.randn(dy.shape, generator=generator).contiguous(memory_format=memory_format)

    x64, weight64 = x.double().requires_grad_(), blocks.dense.double().requires_grad_()
    y64 = F.conv2d(x64, weight64, None, **case.geometry)
    dx64, dweight64 = torch.autograd.grad(y64, (x64, weight64), dy.double())
    want = (y64.detach() + bias[None, :, None, None] + residual).relu()

    _C.use_isa(isa)
    y = unwritten(*dy.shape, channels_last=channels_last)
    _C.conv2d_f32(shape, x.data_ptr(), channels_last, *blocks.pointers, bias.data_ptr(), residual.data_ptr(),
                  y.data_ptr(), channels_last, 1, threads)  # fmt: skip
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=3e-5)

    frozen = _C.PackedConv2d(shape, *blocks.pointers, bias.data_ptr(), 1)
    y = unwritten(*dy.shape, channels_last=channels_last)
    frozen.run(x.data_ptr(), channels_last, residual.data_ptr(), y.data_ptr(), channels_last, threads)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=3e-5)

    dx = unwritten(*x.shape, channels_last=channels_last)
    _C.conv2d_grad_input_f32(shape, dy.data_ptr(), channels_last, *blocks.pointers, dx.data_ptr(), channels_last,
                             threads)  # fmt: skip
    torch.testing.assert_close(dx.double(), dx64, rtol=1e-5, atol=3e-5)

    dvalues = unwritten(*blocks.values.shape)
    _C.conv2d_grad_values_f32(shape, x.data_ptr(), channels_last, dy.data_ptr(), channels_last, *blocks.pointers[1:],
                              dvalues.data_ptr(), threads)  # fmt: skip
    torch.testing.assert_close(dvalues.double(), blocks.gather(dweight64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch", [0, 1, 3, 7, 40])
@pytest.mark.parametrize("block", [(16, 1), (8, 3)], ids=["16x1", "8x3"])
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_linear_equals_fp64(isa, block, batch, isa_restored):
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    in_features, out_features, threads = 70, 52, 2
    blocks = Blocks(out_features, in_features, 1, 1, *block, density=0.4, seed=3)
    weight64 = blocks.dense.double().reshape(out_features, in_features)
    generator = torch.Generator().manual_seed(4)
    x, dy = torch.randn(batch, in_features, generator=generator), torch.randn(batch, out_features, generator=generator)
    bias = torch.randn(out_features, generator=generator)

    _C.use_isa(isa)
    y = unwritten(batch, out_features)
    _C.linear_f32(x.data_ptr(), batch, in_features, *blocks.pointers, *block, bias.data_ptr(), 0, y.data_ptr(),
                  out_features, 0, threads)  # fmt: skip
    torch.testing.assert_close(y.double(), x.double() @ weight64.T + bias, rtol=1e-5, atol=3e-5)

    frozen = _C.PackedLinear(in_features, out_features, *block, *blocks.pointers, bias.data_ptr(), 0)
    y = unwritten(batch, out_features)
    frozen.run(x.data_ptr(), batch, 0, y.data_ptr(), threads)
    torch.testing.assert_close(y.double(), x.double() @ weight64.T + bias, rtol=1e-5, atol=3e-5)

    dx = unwritten(batch, in_features)
    _C.linear_grad_input_f32(dy.data_ptr(), batch, out_features, *blocks.pointers, *block, dx.data_ptr(), in_features,
                             threads)  # fmt: skip
    torch.testing.assert_close(dx.double(), dy.double() @ weight64, rtol=1e-5, atol=3e-5)

    dvalues = unwritten(*blocks.values.shape)
    _C.linear_grad_values_f32(x.data_ptr(), batch, in_features, dy.data_ptr(), out_features, *blocks.pointers[1:],
                              *block, dvalues.data_ptr(), threads)  # fmt: skip
    want = blocks.gather((dy.double().T @ x.double()).reshape(out_features, in_features, 1, 1))
    torch.testing.assert_close(dvalues.double(), want, rtol=1e-5, atol=3e-5)


def test_gradient_of_the_values_is_the_same_every_time():
    blocks = Blocks(32, 16, 3, 3, 16, 1, 0.5, seed=5)
    shape = _C.Conv2dShape((9, 16, 12, 12), 32, (3, 3), padding=(1, 1))
    x, dy = torch.randn(9, 16, 12, 12), torch.randn(9, 32, 12, 12)
    runs = []
    for _ in range(5):
        dvalues = unwritten(*blocks.values.shape)
        _C.conv2d_grad_values_f32(shape, x.data_ptr(), False, dy.data_ptr(), False, *blocks.pointers[1:],
                                  dvalues.data_ptr(), 2)  # fmt: skip
        runs.append(dvalues)
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def guarded(tensor):
    """A copy between NaNs, so that a read past either end is seen."""
    storage = torch.full((tensor.numel() + 128,), float("nan"), dtype=tensor.dtype)
    inner = storage[64 : 64 + tensor.numel()].as_strided(tensor.shape, tensor.stride(), 64)
    inner.copy_(tensor)
    return inner


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pair", [False, True], ids=["own-block", "16x2"])
@conv2d_cases
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_conv2d_bf16_errs_at_most_twice_as_much_as_torch(isa, case, pair, channels_last, isa_restored):
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    _C.use_isa(isa)
    blocks = blocks_of(case, 0, (16, 2) if pair else None)
    blocks.values = blocks.values.bfloat16()
    weight, geometry = blocks.dense.bfloat16(), case.geometry
    shape = shape_of(case, blocks)
    generator = torch.Generator().manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = guarded(
        torch.randn(case.n, case.c, *case.image, generator=generator).bfloat16().contiguous(memory_format=layout)
    )
    bias = torch.randn(case.k, generator=generator).bfloat16()
    bias32 = bias.float()
    theirs = F.conv2d(x, weight, bias, **geometry)
    residual = torch.randn(theirs.shape, generator=generator).bfloat16().contiguous(memory_format=layout)
    want = F.conv2d(x.double(), weight.double(), bias.double(), **geometry) + residual.double()
    theirs = (theirs + residual).double()
    for threads, act in ((1, "none"), (2, "relu")):
        y = unwritten(*want.shape, channels_last=channels_last).to(torch.bfloat16, memory_format=layout)
        pointers = (*blocks.pointers, bias32.data_ptr())
        _C.conv2d_bf16(shape, x.data_ptr(), channels_last, *pointers, residual.data_ptr(), y.data_ptr(), channels_last,
                       _C.ACTIVATIONS[act], threads)  # fmt: skip
        packed = unwritten(*want.shape, channels_last=channels_last).to(torch.bfloat16, memory_format=layout)
        frozen = _C.PackedConv2dBf16(shape, *pointers, _C.ACTIVATIONS[act])
        frozen.run(x.data_ptr(), channels_last, residual.data_ptr(), packed.data_ptr(), channels_last, threads)
        assert torch.equal(y, packed)
        if not y.numel():
            continue
        error, limit = (activations64(out)[act] - activations64(want)[act] for out in (y.double(), theirs))
        assert error.abs().max() <= 2 * limit.abs().max() + 1e-6


def assert_rounded_once(got, want):
    """bf16 results of float32 sums: half a unit in the last place off, beside what the sums lose."""
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pair", [False, True], ids=["own-block", "16x2"])
@conv2d_cases
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_conv2d_bf16_gradients_are_rounded_once(isa, case, pair, channels_last, threads, isa_restored):
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    _C.use_isa(isa)
    blocks = blocks_of(case, 0, (16, 2) if pair else None)
    blocks.values = blocks.values.bfloat16()
    shape = shape_of(case, blocks)
    generator = torch.Generator().manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (
        guarded(torch.randn(size, generator=generator).bfloat16().contiguous(memory_format=layout))
        for size in ((case.n, case.c, *case.image), (case.n, case.k, shape.p, shape.q))
    )
    x64, weight64 = x.double().requires_grad_(), blocks.dense.bfloat16().double().requires_grad_()
    dx64, dweight64 = torch.autograd.grad(F.conv2d(x64, weight64, None, **case.geometry), (x64, weight64), dy.double())

    dx = unwritten(*x.shape, channels_last=channels_last).to(torch.bfloat16, memory_format=layout)
    _C.conv2d_grad_input_bf16(shape, dy.data_ptr(), channels_last, *blocks.pointers, dx.data_ptr(), channels_last,
                              threads)  # fmt: skip
    assert_rounded_once(dx, dx64)
    dvalues = unwritten(*blocks.values.shape).bfloat16()
    _C.conv2d_grad_values_bf16(shape, x.data_ptr(), channels_last, dy.data_ptr(), channels_last, *blocks.pointers[1:],
                               dvalues.data_ptr(), threads)  # fmt: skip
    assert_rounded_once(dvalues, blocks.gather(dweight64))


@pytest.mark.parametrize("batch", [0, 1, 3, 7, 40])
@pytest.mark.parametrize("block", [(16, 1), (16, 2), (8, 3)], ids=["16x1", "16x2", "8x3"])
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_linear_bf16_gradients_are_rounded_once(isa, block, batch, isa_restored):
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    _C.use_isa(isa)
    for in_features, out_features in ((70, 52), (69, 51)):
        blocks = Blocks(out_features, in_features, 1, 1, *block, density=0.4, seed=3)
        blocks.values = blocks.values.bfloat16()
        generator = torch.Generator().manual_seed(4)
        x, dy = (
            guarded(torch.randn(batch, size, generator=generator).bfloat16()) for size in (in_features, out_features)
        )
        dx = unwritten(*x.shape).bfloat16()
        _C.linear_grad_input_bf16(dy.data_ptr(), batch, out_features, *blocks.pointers, *block, dx.data_ptr(),
                                  in_features, 2)  # fmt: skip
        assert_rounded_once(dx, dy.double() @ blocks.dense.bfloat16().double().reshape(out_features, in_features))
        dvalues = unwritten(*blocks.values.shape).bfloat16()
        _C.linear_grad_values_bf16(x.data_ptr(), batch, in_features, dy.data_ptr(), out_features, *blocks.pointers[1:],
                                   *block, dvalues.data_ptr(), 2)  # fmt: skip
        want = blocks.gather((dy.double().T @ x.double()).reshape(out_features, in_features, 1, 1))
        assert_rounded_once(dvalues, want)


@pytest.mark.parametrize("batch", [0, 1, 3, 40])
@pytest.mark.parametrize("block", [(16, 1), (16, 2), (8, 3)], ids=["16x1", "16x2", "8x3"])
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_linear_bf16_errs_at_most_twice_as_much_as_torch(isa, block, batch, isa_restored):
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    _C.use_isa(isa)
    for in_features in (69, 70):
        blocks = Blocks(52, in_features, 1, 1, *block, density=0.4, seed=3)
        blocks.values = blocks.values.bfloat16()
        weight = blocks.dense.bfloat16().reshape(52, in_features)
        x = guarded(torch.randn(batch, in_features, generator=torch.Generator().manual_seed(4)).bfloat16())
        y = unwritten(batch, 52).bfloat16()
        _C.linear_bf16(x.data_ptr(), batch, in_features, *blocks.pointers, *block, 0, 0, y.data_ptr(), 52, 0, 2)
        packed = unwritten(batch, 52).bfloat16()
        _C.PackedLinearBf16(in_features, 52, *block, *blocks.pointers).run(x.data_ptr(), batch, 0, packed.data_ptr(), 1)
        assert torch.equal(y, packed)
        want = x.double() @ weight.double().T
        if batch:
            limit = 2 * (F.linear(x, weight).double() - want).abs().max() + 1e-6
            assert (y.double() - want).abs().max() <= limit


def test_bf16_output_is_rounded_to_nearest_even(isa_restored):
    """bf16 to float and back moves nothing; sums on a tie go to the even neighbour."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    ulp = torch.tensor([1.0, 1.0078125, -1.0, -1.0078125])
    row_ptr = torch.zeros(2, dtype=torch.int32)
    shape = _C.Conv2dShape((1, 1, 1, 65536), 1, (1, 1))
    for isa in _C.isas():
        _C.use_isa(isa)
        y = torch.empty_like(every)
        arguments = (0, row_ptr.data_ptr(), 0, 0)
        _C.conv2d_bf16(shape, y.data_ptr(), False, *arguments, 0, every.data_ptr(), y.data_ptr(), False, 0, 1)
        torch.testing.assert_close(y, every, rtol=0, atol=0, equal_nan=True)
        for half in (0.00390625, -0.00390625, 0.0039, float("inf")):
            bias, residual = torch.tensor([half]), ulp.bfloat16()
            small, y = _C.Conv2dShape((1, 1, 1, 4), 1, (1, 1)), torch.empty(4, dtype=torch.bfloat16)
            _C.conv2d_bf16(small, y.data_ptr(), False, *arguments, bias.data_ptr(), residual.data_ptr(), y.data_ptr(),
                           False, 0, 1)  # fmt: skip
            assert torch.equal(y, (ulp + half).bfloat16())


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="ACTIVATIONS"):
        _C.linear_f32(0, 0, 1, 0, 0, 0, 0, 16, 1, 0, 0, 0, 1, len(_C.ACTIVATIONS), 1)


def run_with_isa(name):
    code = "import torch; from sparsekd import _C; print(_C.isa())"
    environment = {**os.environ, "SPARSEKD_CPU_ISA": name}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_environment_forces_an_isa_or_is_refused(isa):
    result = run_with_isa(isa)
    if isa in _C.isas():
        assert result.stdout.strip() == isa
    else:
        assert "RuntimeError" in result.stderr and all(name in result.stderr for name in _C.isas())


def test_unknown_isa_is_refused_with_the_list(isa_restored):
    result = run_with_isa("mmx")
    assert result.returncode != 0
    assert "SPARSEKD_CPU_ISA" in result.stderr and "'mmx'" in result.stderr
    assert all(name in result.stderr for name in _C.isas())
    with pytest.raises(RuntimeError, match="scalar"):
        _C.use_isa("mmx")


def object_files():
    """The object files of the last build in this checkout, by source name."""
    root = pathlib.Path(__file__).resolve().parent.parent
    return {path.name.removesuffix(".o"): path for path in root.glob("build/cp*/CMakeFiles/*.dir/*.cpp.o")}


def tool_output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif("kernels_avx512.cpp" not in object_files(), reason="no x86-64 build tree in this checkout")
def test_wide_registers_stay_in_their_own_kernels():
    """Code outside the kernels of an instruction set runs before the CPU is asked, so it must not need one."""
    wide = {"y", "z"}
    allowed = {f"kernels_avx512{more}.cpp": wide for more in ("", "_bf16", "_vnni")} | {"kernels_avx2.cpp": {"y"}}
    for name, path in object_files().items():
        code = tool_output("objdump", "-d", "--no-show-raw-insn", str(path))
        used = set(re.findall(r"%([yz])mm", code))
        assert used <= allowed.get(name, set()), f"{name} uses {used}"
        assert name not in allowed or used == allowed[name]
        assert ("vdpbf16ps" in code) == (name == "kernels_avx512_bf16.cpp"), name
        assert ("vpdpbusd" in code) == (name == "kernels_avx512_vnni.cpp"), name


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.skipif("kernels_avx512.cpp" not in object_files(), reason="no x86-64 build tree in this checkout")
def test_kernels_share_no_inline_function():
    """A weak function of a wide object file could be the copy that the linker keeps for everybody."""
    for name, path in object_files().items():
        if not name.startswith("kernels_"):
            continue
        symbols = [line.split()[-2:] for line in tool_output("nm", "-C", str(path)).splitlines()]
        assert [symbol for kind, symbol in symbols if kind in "WVuw"] == [], name


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif("kernels_avx512.cpp" not in object_files(), reason="no x86-64 build tree in this checkout")
@pytest.mark.parametrize("name", ["kernels_avx2.cpp", "kernels_avx512.cpp"])
def test_register_tiles_keep_their_sums_in_registers(name):
    """A tile that calls its epilogue, instead of holding it, takes twice the time: its sums then live in memory."""
    code = tool_output("objdump", "-d", "-C", "--no-show-raw-insn", str(object_files()[name]))
    assert "finish_tile" not in code
    functions = re.split(r"\n(?=[0-9a-f]{16} <)", code)
    named = r"\S+ <void [^\n]*\bforward_(?:tile|line)<[^\n]*FloatSums, [\d, ]+(?:true|false)>"
    tiles = [one for one in functions if re.match(named, one)]
    assert len(tiles) > 10
    single = [one for one in functions if re.match(r"\S+ <void [^\n]*\bdepthwise_tile<\d, true>", one)]
    assert single or name != "kernels_avx2.cpp"  # else it may be inlined
    for tile in tiles + [one.rpartition("vfmadd")[0] for one in single]:  # the rest may call an activation
        to_stack = re.findall(r"vmov\w+\s+%[xyz]mm\d+,(?:-0x[0-9a-f]+\(%rbp|(?:0x[0-9a-f]+)?\(%rsp)", tile)
        assert tile.count("vfmadd") > 0 and not to_stack, tile.split("\n", 1)[0]
