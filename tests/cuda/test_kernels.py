"""The Triton kernels by their launchers: every tile that may be chosen, and the fused epilogue."""

import pytest
import torch
import torch.nn.functional as F

from sparsekd import BlockPattern
from sparsekd.backends import cuda as backend
from sparsekd.backends.cuda import cost, masks, ops, plan

from ..cases import Conv, Linear, tensor_core_case
from .common import (
    DEVICE,
    SMALL,
    TRITON,
    always,
    assert_as_exact_as_torch,
    conv2d_kernels,
    gather_gemm,
    geometry,
    last,
    operands,
    ours,
    tiles,
    torchs,
    weight_of,
)

TILES = [
    (direction, family, tile)
    for (kind, family), tiles in tiles.FAMILIES.items()
    for direction in (("grad_values",) if kind == "products" else ("forward", "grad_input"))
    for tile in tiles
]


@pytest.mark.parametrize(("direction", "family", "tile"), TILES, ids=str)
def test_every_tile(direction, family, tile):
    """A ragged number of pixels, more channels than a narrow tile, a stride: each direction by its launcher."""
    dtype = torch.float16 if family == "half" else torch.float32
    case = Conv("tile", n=1, c=64, k=96, image=(7, 9), pattern=BlockPattern(32, 32), stride=(1, 2), density=0.2)
    x, values, blocks = operands(case, dtype)
    weight = weight_of(case, values)
    *_, grad = torchs(case, x, blocks, None, None, torch.float64)
    grad = last(grad.to(dtype))
    exact = dict(zip(tiles.DIRECTIONS, torchs(case, x, blocks, None, grad, torch.float64), strict=False))[direction]
    got = torch.full(exact.shape, float("nan"), device=DEVICE, dtype=dtype)
    got = got if direction == "grad_values" else last(got)
    table = masks.Mask(blocks.row_ptr, blocks.col_idx, weight).table(direction, tile)
    left, right = {"forward": (x, values), "grad_input": (grad, values), "grad_values": (grad, x)}[direction]
    launch = getattr(conv2d_kernels, direction)
    precision = "tf32" if family == "tf32" else "ieee"
    launch(left, right, table, weight, tile, got, precision=precision)(left, right, got)
    relative = {"half": 2e-3, "tf32": 2e-3, "ieee": 1e-5}[family]
    assert (got.double() - exact).abs().max() <= relative * exact.abs().max()


PLACES = {
    "low blocks, stride, ragged groups": Conv(
        "low", n=1, c=48, k=96, groups=2, image=(4, 5), stride=(2, 1), pattern=BlockPattern(16, 16), density=0.4
    ),
    "wide blocks, one pixel": Conv(
        "wide", n=1, c=72, k=64, kernel=(1, 1), padding=(0, 0), image=(3, 5), pattern=BlockPattern(64, 64), density=0.7
    ),
    # 2^20 rows of 40 pixels of 64 channels: where a filling slot points is further than 32 bits reach.
    "far outside": Conv("far", n=1, c=64, k=16, image=(2, 40), pattern=BlockPattern(16, 16), density=0.1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("direction", "family", "tile"), TILES, ids=str)
def test_every_tile_keeps_its_promises(direction, family, tile, place):
    """Hints, bounds and 32-bit products (checked.py), for blocks lower and wider than a tile, groups and borders."""
    case, dtype = PLACES[place], torch.float16 if family == "half" else torch.float32
    x, values, blocks = operands(case, dtype)
    weight = weight_of(case, values)
    if tile not in tiles.candidates(direction, family, weight, 90):
        pytest.skip("this layer never gets this tile")
    want = torchs(case, x, blocks, None, None, torch.float32)
    grad, exact = last(want[3].to(dtype)), dict(zip(tiles.DIRECTIONS, want, strict=False))[direction]
    got = torch.empty(exact.shape, device=DEVICE, dtype=dtype)
    table = masks.Mask(blocks.row_ptr, blocks.col_idx, weight).table(direction, tile)
    left, right = {"forward": (x, values), "grad_input": (grad, values), "grad_values": (grad, x)}[direction]
    got = got if direction == "grad_values" else last(got)
    launch = getattr(conv2d_kernels, direction)
    precision = "tf32" if family == "tf32" else "ieee"
    launch(left, right, table, weight, tile, got, precision=precision)(left, right, got)
    torch.testing.assert_close(got.float(), exact.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("splits", "group"), [(2, 1), (5, 3), (3, cost.NO_GROUPS)])
def test_parts_and_orders_change_nothing_but_rounding(splits, group, monkeypatch):
    """Walks cut into parts (more parts than steps, too), any order of tiles, two runs bit-equal."""
    case = Conv("parts", n=2, c=32, k=48, image=(5, 4), pattern=BlockPattern(16, 16), density=0.15)
    always(monkeypatch, plan.Choice("triton", tiles.Tile(16, 16, 16, 4, 2, splits=splits, group=group)))
    assert_as_exact_as_torch(case, torch.float32)
    x, values, blocks = operands(case, torch.float32)
    grad, residual = (last(torch.randn(2, 48, 5, 4, device=DEVICE)) for _ in range(2))
    bias = torch.randn(48, device=DEVICE)
    runs = [ours(case, x, values, blocks, bias, grad, residual=residual, activation="relu") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- The fused epilogue

ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}


def test_the_kernels_and_the_dense_paths_know_the_same_activations():
    assert set(gather_gemm.ACTIVATIONS) == set(ops.ACTIVATIONS) == {None, *ACTIVATIONS}


@pytest.mark.parametrize(
    ("tile", "activation"),
    [
        (SMALL, "relu"),
        (SMALL, "relu6"),
        (SMALL, "silu"),
        (SMALL._replace(splits=2), "silu"),
        (tiles.GATHER_HALF[0], "relu6"),
        (tiles.GATHER_HALF[1], "relu6"),
        (tiles.GATHER_HALF[3], "silu"),
        (None, "silu"),
    ],
    ids=str,
)
def test_bias_residual_and_activation_are_fused(tile, activation, monkeypatch):
    always(monkeypatch, plan.Choice("triton", tile) if tile else plan.DENSE)
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
    always(monkeypatch, TRITON)
    case = tensor_core_case(Linear("fused", batch=(3, 5), pattern=BlockPattern(16, 16)))
    x, values, blocks = operands(case, torch.float32)
    bias, residual = torch.randn(case.outputs, device=DEVICE), torch.randn(3, 5, case.outputs, device=DEVICE)
    arguments = (x, values, blocks.row_ptr, blocks.col_idx, bias, case.outputs)
    got = backend.linear(*arguments, residual=residual, activation="silu")
    want = F.silu(F.linear(x.double(), blocks.to_dense().double(), bias.double()) + residual.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"activation must be one of .*'silu'.*, got 'gelu'"):
        ops.finish(got, None, "gelu")


def test_a_contiguous_input_gives_a_contiguous_output(monkeypatch):
    always(monkeypatch, TRITON)
    case = Conv("contiguous", pattern=BlockPattern(16, 16))
    x, values, blocks = operands(case, torch.float32)
    arguments = (values, blocks.row_ptr, blocks.col_idx, None, case.k, *geometry(case))
    y, y_last = (backend.conv2d(t, *arguments) for t in (x.contiguous(), x))
    assert y.is_contiguous() and y_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, y_last)
