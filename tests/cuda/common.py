"""What the tests of the CUDA backend share: kernels, compiled where there is a GPU and else interpreted, and cases."""

import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from sparsekd import BlockPattern, BlockSparse
from sparsekd.backends import cuda as backend
from sparsekd.backends.cuda import masks, plan
from sparsekd.ops.conv2d import Geometry

from ..cases import CONVS, LINEARS, Conv, Linear, random_weight, tensor_core_case

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The kernels are compiled or interpreted for good when their modules are imported.
with mock.patch.dict(os.environ, {} if GPU else {"TRITON_INTERPRET": "1"}):
    from sparsekd.kernels import (  # noqa: F401  # noqa: F401
        attention,
        attention_kd,
        attention_match,
        block_products,
        embedding,
        embedding_grad,
        embedding_top_k,
        gather_gemm,
        index,
        tiles,
    )
    from sparsekd.kernels import conv2d as conv2d_kernels  # noqa: F401

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
SMALL = tiles.Tile(64, 32, 32, 4, 2)
TRITON = plan.Choice("triton", SMALL)
by_id = {"ids": lambda case: case.id}
CONV_CASES = [tensor_core_case(case) for case in CONVS if case.id not in ("depthwise", "1x1-block", "4x4", "8x1")]
LINEAR_CASES = [tensor_core_case(case) for case in LINEARS]


def always(monkeypatch, choice):
    """Every op takes this choice."""
    monkeypatch.setattr(plan.Plan, "choose", lambda self, problem, guess: choice)


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
    return Geometry(case.kernel, case.stride, case.padding, case.dilation, case.groups)


def weight_of(case, values):
    return index.Weight(case.k, case.c // case.groups, *values.shape[1:], *geometry(case))


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


def conv_problem(density=0.3, channels=256, images=128, direction="forward", block=64):
    """(problem, mask, values) of a 14x14 layer whose mask keeps whole groups of rows alike."""
    grid = (channels // block, channels // block, 3, 3)
    kept = torch.rand(1, *grid[1:]).argsort(1) < max(round(density * grid[1]), 1)
    blocks = BlockSparse.from_dense(
        torch.ones(channels, channels, 3, 3), BlockPattern(block, block), mask=kept.expand(grid).contiguous()
    )
    weight = index.Weight(channels, channels, block, block, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    mask = masks.Mask(blocks.row_ptr.to(DEVICE), blocks.col_idx.to(DEVICE), weight)
    problem = plan.Problem(direction, "bfloat16", "half", images, (14, 14), weight, density)
    return problem, mask, blocks.values.to(DEVICE, torch.bfloat16)
