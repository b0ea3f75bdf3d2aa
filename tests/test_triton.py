"""The Triton kernels against float64, on a GPU where there is one and else interpreted on the CPU: every edge case of
the CPU tests, every tile that may be chosen, the choice itself, and the index tables."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import sparsekd
from sparsekd import BlockPattern, BlockSparse
from sparsekd.backends import cuda as backend

from .cases import CONVS, LINEARS, Conv, Linear, random_weight, tensor_core_case

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The kernels are compiled or interpreted for good when their modules are imported.
with mock.patch.dict(os.environ, {} if GPU else {"TRITON_INTERPRET": "1"}):
    from sparsekd.kernels import _block_products, _cost, _gather_gemm, _index, _plan, _tiles  # noqa: F401
    from sparsekd.kernels import conv2d as conv2d_kernels

SMALL = _tiles.Tile(64, 32, 32, 4, 2)
TRITON = _plan.Choice("triton", SMALL)
by_id = {"ids": lambda case: case.id}


CONV_CASES = [tensor_core_case(case) for case in CONVS if case.id not in ("depthwise", "1x1-block", "4x4", "8x1")]
LINEAR_CASES = [tensor_core_case(case) for case in LINEARS]


@pytest.fixture(autouse=True)
def _plan_of_its_own(monkeypatch, tmp_path):
    """No choice is read from, or left in, the plan of the machine; float32 means float32, for cuDNN too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("SPARSEKD_PLAN", str(tmp_path / "plan.json"))
    backend._plan_of.cache_clear()
    backend._masks.clear()
    yield
    backend._plan_of.cache_clear()


def choose(monkeypatch, choice):
    """Every op takes this choice."""
    monkeypatch.setattr(_plan.Plan, "choose", lambda self, problem, guess: choice)


def operands(case, dtype):
    """(x, values in dtype, blocks, grad) on the device; the case's layout is channels_last."""
    blocks, _ = random_weight(case)
    blocks = replace(blocks, **{name: getattr(blocks, name).to(DEVICE) for name in ("row_ptr", "col_idx", "values")})
    shape = (case.n, case.c, *case.image) if isinstance(case, Conv) else (*case.batch, case.inputs)
    x = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    values = blocks.values.to(dtype)
    return (last(x) if x.dim() == 4 and isinstance(case, Conv) else x), values, replace(blocks, values=values)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def geometry(case):
    return (case.kernel, case.stride, case.padding, case.dilation, case.groups)


def ours(case, x, values, blocks, bias, grad, **fused):
    """Output and both gradients by the backend."""
    index = (blocks.row_ptr, blocks.col_idx)
    if isinstance(case, Linear):
        y = backend.linear(x, values, *index, bias, case.outputs, **fused)
        dx = backend.linear_grad_input(grad, values, *index, case.inputs)
        return y, dx, backend.linear_grad_values(grad, x, *index, *values.shape[1:])
    y = backend.conv2d(x, values, *index, bias, case.k, *geometry(case), **fused)
    dx = backend.conv2d_grad_input(grad, values, *index, x.shape, *geometry(case))
    return y, dx, backend.conv2d_grad_values(grad, x, *index, *values.shape[1:], *geometry(case))


def torchs(case, x, blocks, bias, grad, dtype):
    """Output and both gradients by torch on the dense weight in ``dtype``; grad None draws one."""
    x = x.detach().to(dtype).requires_grad_()
    weight = blocks.to_dense().to(dtype).requires_grad_()
    bias = None if bias is None else bias.to(dtype)
    y = F.linear(x, weight, bias) if isinstance(case, Linear) else F.conv2d(x, weight, bias, **case.geometry)
    grad = torch.randn(y.shape).to(y) if grad is None else grad.to(dtype)
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    return y.detach(), dx, BlockSparse.from_dense(dw, case.pattern, mask=blocks.mask()).values, grad


def assert_as_exact_as_torch(case, dtype, *, bias=True, close=1e-4):
    """float32: close to float64. Half types: error at most twice torch's own in that type, both against float64."""
    x, values, blocks = operands(case, dtype)
    bias = torch.randn(blocks.shape[0]).to(DEVICE, dtype) if bias else None
    *exact, grad = torchs(case, x, blocks, bias, None, torch.float64)
    grad = grad.to(dtype)
    *exact, _ = torchs(case, x, blocks, bias, grad, torch.float64)
    *same, _ = torchs(case, x, blocks, bias, grad, dtype)
    for name, want, peer, got in zip(
        ("output", "grad x", "grad values"), exact, same, ours(case, x, values, blocks, bias, grad), strict=True
    ):
        assert got.shape == want.shape and got.dtype == dtype, name
        if not got.numel():
            continue
        error, peers = ((t.double() - want).abs().max().item() for t in (got, peer))
        allowed = close * max(1.0, want.abs().max().item()) if dtype == torch.float32 else 2 * peers + 1e-6
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


# ---- Edge cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONV_CASES, **by_id)
def test_conv2d_forward_and_gradients(case, dtype, monkeypatch):
    choose(monkeypatch, TRITON)
    assert_as_exact_as_torch(case, dtype, bias=case.id != "3x3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", LINEAR_CASES, **by_id)
def test_linear_forward_and_gradients(case, dtype, monkeypatch):
    choose(monkeypatch, TRITON)
    assert_as_exact_as_torch(case, dtype, bias=case.id != "plain")


BLOCKS = [(16, 32), (32, 16), (48, 16), (16, 48), (64, 64), (128, 32)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_blocks_lower_and_higher_than_a_tile(block, monkeypatch):
    choose(monkeypatch, TRITON)
    case = Conv("block", n=1, c=48, k=144, image=(3, 4), pattern=BlockPattern(*block), density=0.3)
    assert_as_exact_as_torch(case, torch.float32)


# ---- Every tile that may be chosen

TILES = [
    (direction, family, tile)
    for (kind, family), tiles in _tiles.FAMILIES.items()
    for direction in (("grad_values",) if kind == "products" else ("forward", "grad_input"))
    for tile in tiles
]


@pytest.mark.parametrize(("direction", "family", "tile"), TILES, ids=str)
def test_every_tile(direction, family, tile):
    """A ragged number of pixels, more channels than a narrow tile, a stride: each direction by its launcher."""
    dtype = torch.float16 if family == "half" else torch.float32
    case = Conv("tile", n=1, c=64, k=96, image=(7, 9), pattern=BlockPattern(32, 32), stride=(1, 2), density=0.2)
    x, values, blocks = operands(case, dtype)
    weight = backend._weight(case.k, case.c, values, *geometry(case))
    *_, grad = torchs(case, x, blocks, None, None, torch.float64)
    grad = last(grad.to(dtype))
    exact = dict(zip(_tiles.DIRECTIONS, torchs(case, x, blocks, None, grad, torch.float64), strict=False))[direction]
    got = torch.full(exact.shape, float("nan"), device=DEVICE, dtype=dtype)
    got = got if direction == "grad_values" else last(got)
    table = backend.Mask(blocks.row_ptr, blocks.col_idx, weight).table(direction, tile)
    left, right = {"forward": (x, values), "grad_input": (grad, values), "grad_values": (grad, x)}[direction]
    launch = getattr(conv2d_kernels, direction)
    launch(left, right, table, weight, tile, got, precision="tf32" if family == "tf32" else "ieee")
    relative = {"half": 2e-3, "tf32": 2e-3, "ieee": 1e-5}[family]
    assert (got.double() - exact).abs().max() <= relative * exact.abs().max()


@pytest.mark.parametrize(("splits", "group"), [(2, 1), (5, 3), (3, _cost.NO_GROUPS)])
def test_parts_and_orders_change_nothing_but_rounding(splits, group, monkeypatch):
    """Walks cut into parts (more parts than steps, too), any order of tiles, two runs bit-equal."""
    case = Conv("parts", n=2, c=32, k=48, image=(5, 4), pattern=BlockPattern(16, 16), density=0.15)
    choose(monkeypatch, _plan.Choice("triton", _tiles.Tile(16, 16, 16, 4, 2, splits=splits, group=group)))
    assert_as_exact_as_torch(case, torch.float32)
    x, values, blocks = operands(case, torch.float32)
    grad, residual = (last(torch.randn(2, 48, 5, 4, device=DEVICE)) for _ in range(2))
    bias = torch.randn(48, device=DEVICE)
    runs = [ours(case, x, values, blocks, bias, grad, residual=residual, activation="relu") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- The fused epilogue


ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}


def test_the_kernels_and_the_dense_paths_know_the_same_activations():
    assert set(_gather_gemm.ACTIVATIONS) == set(backend.ACTIVATIONS) == {None, *ACTIVATIONS}


@pytest.mark.parametrize(
    ("tile", "activation"),
    [
        (SMALL, "relu"),
        (SMALL, "relu6"),
        (SMALL, "silu"),
        (SMALL._replace(splits=2), "silu"),
        (_tiles.GATHER_HALF[0], "relu6"),
        (_tiles.GATHER_HALF[2], "silu"),
        (None, "silu"),
    ],
    ids=str,
)
def test_bias_residual_and_activation_are_fused(tile, activation, monkeypatch):
    choose(monkeypatch, _plan.Choice("triton", tile) if tile else _plan.DENSE)
    case = Conv("fused", n=1, c=16, k=272, image=(5, 5), pattern=BlockPattern(16, 16), density=0.5)
    x, values, blocks = operands(case, torch.float16)
    bias, residual = (4 * torch.randn(shape, device=DEVICE).half() for shape in ((case.k,), (1, case.k, 5, 5)))
    residual[0, 7, 2, 3] = float("nan")
    arguments = (x, values, blocks.row_ptr, blocks.col_idx, bias, case.k, *geometry(case))
    got = backend.conv2d(*arguments, residual=last(residual), activation=activation)
    want = F.conv2d(x.double(), blocks.to_dense().double(), bias.double(), padding=1) + residual.double()
    want = ACTIVATIONS[activation](want)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=4e-3, equal_nan=True)
    assert got[0, 7, 2, 3].isnan()


def test_bias_residual_and_activation_of_a_linear_layer(monkeypatch):
    choose(monkeypatch, TRITON)
    case = tensor_core_case(Linear("fused", batch=(3, 5), pattern=BlockPattern(16, 16)))
    x, values, blocks = operands(case, torch.float32)
    bias, residual = torch.randn(case.outputs, device=DEVICE), torch.randn(3, 5, case.outputs, device=DEVICE)
    arguments = (x, values, blocks.row_ptr, blocks.col_idx, bias, case.outputs)
    got = backend.linear(*arguments, residual=residual, activation="silu")
    want = F.silu(F.linear(x.double(), blocks.to_dense().double(), bias.double()) + residual.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"activation must be one of .*'silu'.*, got 'gelu'"):
        backend._finish(got, None, "gelu")


def test_a_contiguous_input_gives_a_contiguous_output(monkeypatch):
    choose(monkeypatch, TRITON)
    case = Conv("contiguous", pattern=BlockPattern(16, 16))
    x, values, blocks = operands(case, torch.float32)
    arguments = (values, blocks.row_ptr, blocks.col_idx, None, case.k, *geometry(case))
    y, y_last = (backend.conv2d(t, *arguments) for t in (x.contiguous(), x))
    assert y.is_contiguous() and y_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, y_last)


# ---- The choice

PATHS = [_plan.DENSE, _plan.COMPACT, TRITON]


@pytest.mark.parametrize("choice", PATHS, ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_every_path_computes_the_same_conv2d(choice, stride, monkeypatch):
    choose(monkeypatch, choice)
    case = Conv("path", c=48, k=64, stride=stride, image=(5, 6), pattern=BlockPattern(16, 16), density=0.1)
    assert_as_exact_as_torch(case, torch.float32)


@pytest.mark.parametrize("choice", PATHS, ids=str)
def test_every_path_computes_the_same_linear(choice, monkeypatch):
    choose(monkeypatch, choice)
    case = Linear("path", batch=(9,), inputs=48, outputs=80, pattern=BlockPattern(16, 16), density=0.2)
    assert_as_exact_as_torch(case, torch.float32)


@pytest.mark.parametrize("case", [Conv("groups", groups=2, c=32), Conv("ragged", c=24, k=40)], **by_id)
def test_the_dense_path_takes_groups_and_ragged_blocks(case, monkeypatch):
    choose(monkeypatch, _plan.DENSE)
    assert_as_exact_as_torch(replace(case, pattern=BlockPattern(16, 16)), torch.float32)


def conv_problem(density=0.3, channels=256, images=128, direction="forward", block=64):
    """(problem, mask, values) of a 14x14 layer whose mask keeps whole groups of rows alike."""
    grid = (channels // block, channels // block, 3, 3)
    kept = torch.rand(1, *grid[1:]).argsort(1) < max(round(density * grid[1]), 1)
    blocks = BlockSparse.from_dense(
        torch.ones(channels, channels, 3, 3), BlockPattern(block, block), mask=kept.expand(grid).contiguous()
    )
    weight = _index.Weight(channels, channels, block, block, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    mask = backend.Mask(blocks.row_ptr.to(DEVICE), blocks.col_idx.to(DEVICE), weight)
    problem = _plan.Problem(direction, "bfloat16", "half", images, (14, 14), weight, density)
    return problem, mask, blocks.values.to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("direction", _tiles.DIRECTIONS)
def test_the_model_prefers_sparse_where_little_is_kept_and_dense_where_all_is(direction):
    assert backend._guess(*conv_problem(0.25, direction=direction)).kernel == "triton"
    # Many images: then making the weight dense costs little beside the product.
    assert backend._guess(*conv_problem(1.0, direction=direction, images=2048)).kernel == "dense"


def test_the_model_prefers_wide_tiles_and_cuts_few_tiles_into_parts():
    wide = dict((str(tile), seconds) for tile, seconds in backend.tiles(*conv_problem(0.25)))
    assert min(wide, key=wide.__getitem__).startswith("128x256")
    _, mask, _ = conv_problem(0.25)  # the same columns in every row: nothing in the union is multiplied by zero
    assert mask.table("forward", _tiles.GATHER_HALF[0]).fill == 1.0
    (small, *_), *_ = backend.tiles(*conv_problem(0.25, images=1)[:3])[2:]
    assert small.splits > 1 and small.group == _cost.NO_GROUPS


def test_the_model_counts_what_the_schedulers_issue():
    """Blocks of 16 channels make four trips of one of 64: narrow tiles then issue more than they multiply."""
    h200, wide, narrow = _cost.DEVICES["NVIDIA H200"], _tiles.GATHER_HALF[0], _tiles.GATHER_HALF[5]
    assert _cost.cap("forward", narrow, h200, 16) < 0.6 * _cost.cap("forward", narrow, h200, 64)
    assert _cost.cap("forward", wide, h200, 16) == _cost.cap("forward", wide, h200)  # L2 is what bounds it
    problem, mask, _ = conv_problem(0.25, block=16)
    tile, work = _cost.arrange(problem, narrow, mask.table("forward", narrow), h200)
    assert work.depth == 16 and _cost.seconds(problem, work, tile, h200) > _cost.seconds(
        problem, work._replace(depth=64), tile, h200
    )


def test_an_older_device_gets_no_tile_that_does_not_fit_it():
    (problem, mask, values), a100 = conv_problem(0.25), _cost.DEVICES["NVIDIA A100-SXM4-80GB"]
    with mock.patch.object(backend, "_device", lambda device: a100):
        assert {tile.since for tile, _ in backend.tiles(problem, mask, values)} == {80}
    with mock.patch.object(backend, "_device", lambda device: a100._replace(shared_bytes=50000)):
        fitting = [tile for tile, _ in backend.tiles(problem, mask, values)]
    assert fitting and all(_cost.shared_bytes("forward", tile, 2) <= 50000 for tile in fitting)


def test_measured_choices_are_kept_and_read_back(monkeypatch, tmp_path):
    problem, _, _ = conv_problem()
    microseconds = {"dense": 100.0, str(TRITON): 60.0}
    monkeypatch.setattr(_plan, "gpu_medians", lambda fns: [microseconds[str(fn.args[0])] for fn in fns])
    plan = _plan.Plan("device", tmp_path / "own.json")
    assert plan.measure(problem, [_plan.DENSE, TRITON], lambda choice: None) == TRITON
    plan.save()
    again = _plan.Plan("device", tmp_path / "own.json")
    assert again.choose(problem, guess=lambda: pytest.fail("was measured")) == TRITON
    assert again.measured == plan.measured
    assert _plan.Plan("another device", tmp_path / "own.json").measured == {}


@pytest.mark.parametrize(("sparse", "chosen"), [(99.0, _plan.DENSE), (97.0, TRITON)])
def test_dense_is_left_only_for_a_real_gain(sparse, chosen, monkeypatch, tmp_path):
    monkeypatch.setattr(_plan, "gpu_medians", lambda fns: [100.0, sparse])
    plan = _plan.Plan("device", tmp_path / "own.json")
    assert plan.measure(conv_problem()[0], [_plan.DENSE, TRITON], lambda choice: None) == chosen


def test_two_plans_may_write_one_file(tmp_path):
    path, row = tmp_path / "own.json", _plan.Measured(TRITON, 1.0, 2.0, {})
    for device in ("one", "two"):
        plan = _plan.Plan(device, path)
        plan.measured["problem"] = row
        plan.save()
    assert set(json.loads(path.read_text())) == {"one", "two"}


def test_a_broken_plan_file_is_named(tmp_path):
    (tmp_path / "own.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"own\.json is no plan file .*; delete it"):
        _plan.Plan("device", tmp_path / "own.json")


def test_measuring_times_every_candidate_and_the_choice_then_runs(monkeypatch):
    tried = []

    def gpu_medians(functions):
        tried.extend(str(fn.args[0]) for fn in functions)
        return [10.0 + index if index else 100.0 for index in range(len(functions))]

    monkeypatch.setattr(_plan, "gpu_medians", gpu_medians)
    case = Conv("measured", n=1, image=(4, 4), pattern=BlockPattern(16, 16), c=32)
    x, values, blocks = operands(case, torch.float16)
    arguments = (x, values, blocks.row_ptr, blocks.col_idx, None, case.k, *geometry(case))
    with _plan.measuring():
        measured = backend.conv2d(*arguments)
    assert tried[0] == "dense" and any(name.startswith("triton") for name in tried)
    plan = backend._plan_of(x.device)
    (row,) = plan.measured.values()
    assert str(row.choice) == tried[1] and row.microseconds == 11.0
    assert torch.equal(backend.conv2d(*arguments), measured)


# ---- What is refused


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Conv("narrow", pattern=BlockPattern(16, 1)), "blocks of 16x1.*multiples of 16.*for_device"),
        (Conv("low", pattern=BlockPattern(8, 16)), "blocks of 8x16"),
        (Conv("stem", c=3, pattern=BlockPattern(16, 16)), "3 input and 32 output channels a group.*multiples of 8"),
        (Conv("outputs", k=100, pattern=BlockPattern(16, 16)), "100 output channels"),
    ],
    ids=lambda value: value.id if isinstance(value, Conv) else "",
)
def test_what_the_kernels_refuse_runs_dense(case, why):
    _, values, _ = operands(case, torch.float32)
    weight = backend._weight(case.k, case.c, values, *geometry(case))
    reason = backend.refusal(values, weight)
    assert reason is not None
    assert re.search(why, reason)
    assert_as_exact_as_torch(case, torch.float32)


@pytest.mark.parametrize("case", [*CONVS, *LINEARS], ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_blocks_for_any_device_run(case, monkeypatch):
    """The cases as they are, most of them with blocks for a CPU; contiguous, where the kernels want channels_last."""
    choose(monkeypatch, TRITON)
    monkeypatch.setattr(sys.modules[__name__], "last", lambda x: x)
    assert_as_exact_as_torch(case, torch.float32)


def test_float64_runs_dense():
    case = Conv("double", pattern=BlockPattern(16, 16))
    x, values, blocks = operands(case, torch.float64)
    assert "float64" in backend.refusal(values, backend._weight(case.k, case.c, values, *geometry(case)))
    arguments = (x, values, blocks.row_ptr, blocks.col_idx, None, case.k, *geometry(case))
    torch.testing.assert_close(backend.conv2d(*arguments), F.conv2d(x, blocks.to_dense(), **case.geometry))


def test_describe_says_what_runs():
    assert "Triton" in backend.describe("conv2d") and "dense library otherwise" in backend.describe("conv2d")
    with mock.patch.object(backend, "uses_triton", lambda: False):
        assert "and CUDA C++ has the forward pass alone" in backend.describe("conv2d_grad_input")


def test_importing_the_package_imports_no_triton():
    code = "import sys, sparsekd; raise SystemExit('triton' in sys.modules or 'sparsekd.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- Masks and tables


def test_a_table_read_by_hand():
    """Two row blocks of 16, three column blocks of 16, 1x1 kernel: row 0 keeps blocks 0 and 2, row 1 keeps 2 alone."""
    row_ptr, col_idx = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 2, 2], dtype=torch.int32)
    weight = _index.Weight(32, 48, 16, 16)
    table = _index.forward_table(row_ptr, col_idx, weight, rows=32, step=16)
    assert table.tiles[:, :4].tolist() == [[0, 32, 0, 2]]
    assert table.slots[:2].tolist() == [[0, 0, 0, 16], [0, 0, 32, 16]]
    assert table.offsets[:2].tolist() == [[0, _index.MISSING], [256, 512]]
    assert table.fill == 0.75 and table.num_steps == 2

    table = _index.transposed_table(row_ptr, col_idx, weight, rows=16, step=16)
    assert table.tiles[:, :4].tolist() == [[32, 48, 1, 3], [0, 48, 0, 1], [16, 48, 1, 1]]  # longest first; the ends
    assert table.slots[:3].tolist() == [[0, 0, 0, 16], [0, 0, 0, 16], [0, 0, 16, 16]]
    assert table.offsets[:3].tolist() == [[0], [256], [512]]


def test_a_stride_gives_each_phase_its_own_taps():
    """3x3, stride 2, padding 1: even pixels see the middle tap alone, odd ones the two outer ones."""
    weight = _index.Weight(16, 16, 16, 16, (3, 3), (2, 2), (1, 1))
    row_ptr, col_idx = torch.tensor([0, 9], dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    table = _index.transposed_table(row_ptr, col_idx, weight, rows=16, step=16)
    steps = {(y, x): end - begin for _, _, begin, end, y, x, _, _ in table.tiles.tolist()}
    assert steps == {(0, 0): 1, (0, 1): 2, (1, 0): 2, (1, 1): 4}


def test_a_mask_changed_in_place_is_noticed(monkeypatch):
    choose(monkeypatch, TRITON)
    row_ptr, col_idx = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    row_ptr, col_idx = row_ptr.to(DEVICE), col_idx.to(DEVICE)
    x, values = torch.randn(4, 32, device=DEVICE), torch.randn(1, 16, 16, device=DEVICE)
    torch.testing.assert_close(backend.linear(x, values, row_ptr, col_idx, None, 16), x[:, :16] @ values[0].T)
    col_idx.fill_(1)
    torch.testing.assert_close(backend.linear(x, values, row_ptr, col_idx, None, 16), x[:, 16:] @ values[0].T)


def test_tables_are_built_once_and_old_masks_forgotten(monkeypatch):
    choose(monkeypatch, TRITON)
    monkeypatch.setattr(backend, "MASKS_KEPT", 2)
    built = mock.Mock(wraps=_index.forward_table)
    monkeypatch.setattr(_index, "forward_table", built)
    case = tensor_core_case(Linear("small", batch=(2,)))
    x, values, blocks = operands(case, torch.float32)
    views = [(blocks.row_ptr, blocks.col_idx), (blocks.row_ptr.detach(), blocks.col_idx.view(-1))]
    for row_ptr, col_idx in views:  # what autograd hands to the backward pass is another object for the same memory
        backend.linear(x, values, row_ptr, col_idx, None, case.outputs)
    assert built.call_count == 1
    for _ in range(3):
        backend.linear(x, values, blocks.row_ptr.clone(), blocks.col_idx.clone(), None, case.outputs)
    assert built.call_count == 4 and len(backend._masks) == 2


def test_masks_a_graph_reads_are_never_forgotten(monkeypatch):
    monkeypatch.setattr(backend, "MASKS_KEPT", 1)
    weight = _index.Weight(16, 16, 16, 16)
    indices = [(torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)) for _ in range(3)]
    captured = backend._mask(*indices[0], weight)
    captured.captured = True
    backend._mask(*indices[1], weight)
    backend._mask(*indices[2], weight)
    assert captured in backend._masks.values() and len(backend._masks) == 2


def test_a_new_mask_inside_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "_is_capturing", lambda tensor: True)
    choose(monkeypatch, TRITON)
    case = tensor_core_case(Linear("small", batch=(2,)))
    x, values, blocks = operands(case, torch.float32)
    with pytest.raises(RuntimeError, match="run the model once before capturing"):
        backend.linear(x, values, blocks.row_ptr, blocks.col_idx, None, case.outputs)


@pytest.mark.slow
def test_the_acceptance_script_rehearses(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "gpu" / "acceptance.sh"
    stages = ["build", "layers1", "network", "training", "losses", "energy", "table"]
    environment = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    environment.pop("SPARSEKD_PLAN")
    subprocess.run(["bash", script, "--rehearse", *stages], env=environment, check=True, timeout=500)
    table = (tmp_path / "sparsekd-gpu-rehearsal" / "table.md").read_text()
    assert "rehearsal: True" in table and "train-tiny" in table and "grad_values" not in table
    assert "| quick sad nchw float32 |" in table


# ---- On a GPU only: what the interpreter cannot show

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


def gpu_layer(**options):
    torch.manual_seed(0)
    layer = sparsekd.nn.SparseConv2d(64, 128, 3, padding=1, pattern=BlockPattern(64, 32), density=0.4, **options)
    return layer.cuda().to(memory_format=torch.channels_last), last(torch.randn(4, 64, 14, 14, device="cuda"))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONV_CASES, **by_id)
def test_gpu_half_types(case, dtype, monkeypatch):
    choose(monkeypatch, TRITON)
    assert_as_exact_as_torch(case, dtype)


@needs_gpu
def test_gpu_autocast_compile_and_two_bit_equal_runs():
    layer, x = gpu_layer()
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for module in (layer, compiled, layer):
        layer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = module(x)
        y.float().square().sum().backward()
        results.append((y.detach(), layer.values.grad.clone()))
    assert results[0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


@needs_gpu
def test_gpu_training_step_in_a_cuda_graph():
    layer, x = gpu_layer()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    want, grad = layer(x).detach().clone(), layer.values.grad.clone()
    layer.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        layer.values.grad.zero_()
        y.square().sum().backward()
    graph.replay()
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(layer.values.grad, grad)


@needs_gpu
def test_gpu_export_and_opcheck():
    layer, x = gpu_layer()
    exported = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))
    weight = (layer.values, layer.row_ptr, layer.col_idx, layer.bias)
    geometry = (128, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    torch.library.opcheck(torch.ops.sparsekd.conv2d.default, (x.requires_grad_(), *weight, *geometry))


@needs_gpu
def test_gpu_prewarm_measures_every_direction():
    layer, x = gpu_layer()
    measured = backend.prewarm(layer, x.requires_grad_())
    assert {key.split()[0] for key in measured} == set(_tiles.DIRECTIONS)
    assert layer.values.grad is None
    assert all(row.microseconds <= row.dense_microseconds for row in measured.values())


@needs_gpu
def test_gpu_offsets_beyond_two_to_the_31():
    """2.2e9 elements: the last image must come out like the first."""
    layer = sparsekd.nn.SparseConv2d(64, 16, 1, bias=False, pattern=BlockPattern(16, 64), density=1.0).cuda().half()
    x = torch.zeros(33, 64, 1024, 1024, device="cuda", dtype=torch.float16, memory_format=torch.channels_last)
    x[0], x[-1] = 1.0, 1.0
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y[0], y[-1]) and y[0].abs().max() > 0
