"""The ops by the Triton kernels, and by the other paths, against float64: every edge case of the CPU tests."""

import re
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from sparsekd import BlockPattern
from sparsekd.backends import cuda as backend
from sparsekd.backends.cuda import choose, plan

from ..cases import CONVS, LINEARS, Conv, Linear, tensor_core_case
from . import common
from .common import (
    CONV_CASES,
    LINEAR_CASES,
    TRITON,
    always,
    assert_as_exact_as_torch,
    by_id,
    geometry,
    operands,
    weight_of,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONV_CASES, **by_id)
def test_conv2d_forward_and_gradients(case, dtype, monkeypatch):
    always(monkeypatch, TRITON)
    assert_as_exact_as_torch(case, dtype, bias=case.id != "3x3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", LINEAR_CASES, **by_id)
def test_linear_forward_and_gradients(case, dtype, monkeypatch):
    always(monkeypatch, TRITON)
    assert_as_exact_as_torch(case, dtype, bias=case.id != "plain")


BLOCKS = [(16, 32), (32, 16), (48, 16), (16, 48), (64, 64), (128, 32)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_blocks_lower_and_higher_than_a_tile(block, monkeypatch):
    always(monkeypatch, TRITON)
    case = Conv("block", n=1, c=48, k=144, image=(3, 4), pattern=BlockPattern(*block), density=0.3)
    assert_as_exact_as_torch(case, torch.float32)


# ---- The paths

PATHS = [plan.DENSE, plan.COMPACT, TRITON]


@pytest.mark.parametrize("choice", PATHS, ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_every_path_computes_the_same_conv2d(choice, stride, monkeypatch):
    always(monkeypatch, choice)
    case = Conv("path", c=48, k=64, stride=stride, image=(5, 6), pattern=BlockPattern(16, 16), density=0.1)
    assert_as_exact_as_torch(case, torch.float32)


@pytest.mark.parametrize("choice", PATHS, ids=str)
def test_every_path_computes_the_same_linear(choice, monkeypatch):
    always(monkeypatch, choice)
    case = Linear("path", batch=(9,), inputs=48, outputs=80, pattern=BlockPattern(16, 16), density=0.2)
    assert_as_exact_as_torch(case, torch.float32)


@pytest.mark.parametrize("case", [Conv("groups", groups=2, c=32), Conv("ragged", c=24, k=40)], **by_id)
def test_the_dense_path_takes_groups_and_ragged_blocks(case, monkeypatch):
    always(monkeypatch, plan.DENSE)
    assert_as_exact_as_torch(replace(case, pattern=BlockPattern(16, 16)), torch.float32)


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
    weight = weight_of(case, values)
    reason = choose.refusal(values, weight)
    assert reason is not None
    assert re.search(why, reason)
    assert_as_exact_as_torch(case, torch.float32)


@pytest.mark.parametrize("case", [*CONVS, *LINEARS], ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_blocks_for_any_device_run(case, monkeypatch):
    """The cases as they are, most of them with blocks for a CPU; contiguous, where the kernels want channels_last."""
    always(monkeypatch, TRITON)
    monkeypatch.setattr(common, "last", lambda x: x)
    assert_as_exact_as_torch(case, torch.float32)


def test_a_bias_that_is_every_second_number_of_a_buffer_is_read_as_such(monkeypatch):
    always(monkeypatch, TRITON)
    case = tensor_core_case(Linear("strided bias", batch=(4,)))
    x, values, blocks = operands(case, torch.float32)
    bias = torch.randn(2 * case.outputs).to(x)[::2]
    got = backend.linear(x, values, blocks.row_ptr, blocks.col_idx, bias, case.outputs)
    torch.testing.assert_close(got, F.linear(x, blocks.to_dense(), bias), rtol=1e-4, atol=1e-4)
    maps = got[:, :, None, None].contiguous(memory_format=torch.channels_last)
    want = maps + bias[:, None, None]
    torch.testing.assert_close(backend.epilogue(maps, bias, None, None), want)


def test_float64_runs_dense():
    case = Conv("double", pattern=BlockPattern(16, 16))
    x, values, blocks = operands(case, torch.float64)
    assert "float64" in choose.refusal(values, weight_of(case, values))
    arguments = (x, values, blocks.row_ptr, blocks.col_idx, None, case.k, *geometry(case))
    torch.testing.assert_close(backend.conv2d(*arguments), F.conv2d(x, blocks.to_dense(), **case.geometry))


def test_describe_says_what_runs():
    assert "Triton" in backend.describe("conv2d") and "dense library otherwise" in backend.describe("conv2d")
    with mock.patch.object(backend, "uses_triton", lambda: False):
        assert "and CUDA C++ has the forward pass alone" in backend.describe("conv2d_grad_input")


def test_importing_the_package_imports_no_triton_and_no_compiler():
    kernels = "conv2d", "gather_gemm", "block_products", "attention", "attention_match", "attention_kd"
    imported = ["triton", "torch._dynamo", *(f"sparsekd.kernels.{name}" for name in kernels)]
    asked = f"any(name in sys.modules for name in {imported})"
    code = f"import sys, sparsekd.freeze, sparsekd.methods, sparsekd.nn; raise SystemExit({asked})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
