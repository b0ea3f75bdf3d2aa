"""linear: forward and both gradients against float64 torch; registration; bad input."""

import pytest
import torch
import torch.nn.functional as F

from sparsekd import BlockSparse, backends, ops

from .cases import LINEARS, Linear, random_weight


def operands(case: Linear, dtype=torch.float32):
    """(x, blocks, bias) of the case, seeded."""
    blocks, _ = random_weight(case, dtype)
    return torch.randn(*case.batch, case.inputs, dtype=dtype), blocks, torch.randn(case.outputs, dtype=dtype)


def assert_gradients_agree(case: Linear, x, blocks: BlockSparse, bias):
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    values = blocks.values.clone().requires_grad_()
    y = ops.linear(x, values, blocks.row_ptr, blocks.col_idx, bias, out_features=case.outputs)
    x64, b64 = (t.detach().double().requires_grad_() for t in (x, bias))
    w64 = blocks.to_dense().double().requires_grad_()
    y64 = F.linear(x64, w64, b64)
    grad = torch.randn_like(y64)
    y.backward(grad.to(y.dtype))
    y64.backward(grad)
    want_values = BlockSparse.from_dense(w64.grad, case.pattern, mask=blocks.mask()).values
    close = {"rtol": 1e-5, "atol": 5e-5} if x.dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for got, want in ((y, y64), (x.grad, x64.grad), (values.grad, want_values), (bias.grad, b64.grad)):
        torch.testing.assert_close(got.double(), want, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", LINEARS, ids=lambda case: case.id)
def test_forward_and_gradients(case, dtype):
    assert_gradients_agree(case, *operands(case, dtype))


@pytest.mark.parametrize("batch", range(1, 35))
def test_every_small_batch(batch):
    case = Linear("batch", batch=(batch,), inputs=37, outputs=50)
    assert_gradients_agree(case, *operands(case))


def test_input_need_not_be_contiguous():
    case = Linear("strided", batch=(6,))
    _, blocks, bias = operands(case)
    assert_gradients_agree(case, torch.randn(case.inputs, 6).T, blocks, bias)


@pytest.mark.parametrize("case", [LINEARS[0], LINEARS[6], LINEARS[7]], ids=lambda case: case.id)
def test_opcheck(case):
    x, blocks, bias = operands(case)
    arguments = (x.requires_grad_(), blocks.values.requires_grad_(), blocks.row_ptr, blocks.col_idx, bias)
    torch.library.opcheck(torch.ops.sparsekd.linear.default, (*arguments, case.outputs))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(2, 32).half()}, TypeError, "one dtype"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(48,\)"),
        ({"out_features": 100}, ValueError, r"need row_ptr of shape \(8,\), got \(4,\)"),
        ({"x": torch.zeros(())}, ValueError, "got a scalar"),
    ],
)
def test_bad_input(change, error, says):
    x, blocks, bias = operands(LINEARS[0])
    good = {"x": x, "values": blocks.values, "row_ptr": blocks.row_ptr, "col_idx": blocks.col_idx, "bias": bias}
    with pytest.raises(error, match=says):
        ops.linear(**{**good, "out_features": 48, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_penalty_has_the_gradient_of_the_dense_layer(dtype):
    """Double backward: the squared norm of the input's gradient, differentiated once more."""
    case = Linear("plain")
    x, blocks, bias = operands(case, dtype)
    x.requires_grad_()
    values, dense = blocks.values.clone().requires_grad_(), blocks.to_dense().requires_grad_()
    found = []
    for output, weight in (
        (ops.linear(x, values, blocks.row_ptr, blocks.col_idx, bias, out_features=case.outputs), values),
        (F.linear(x, dense, bias), dense),
    ):
        (grad,) = torch.autograd.grad(output.square().mean(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (x, weight)))
    want = BlockSparse.from_dense(found[1][1], case.pattern, mask=blocks.mask()).values
    torch.testing.assert_close(found[0], (found[1][0], want), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(backends.cpu.native is None, reason=backends.cpu.missing)
@pytest.mark.parametrize("index", ["col_idx", "row_ptr"])
def test_an_index_beyond_the_operands_is_refused(index):
    """The kernels follow the index blindly: a wrong one must not read or write past the tensors."""
    x, blocks, bias = operands(Linear("plain", density=1.0))
    weight = {"values": blocks.values, "row_ptr": blocks.row_ptr, "col_idx": blocks.col_idx}
    weight[index] = weight[index] + 1
    with pytest.raises(ValueError, match=index):
        ops.linear(x, **weight, bias=bias, out_features=48)
    if index == "col_idx":
        with pytest.raises(ValueError, match=index):
            grad = torch.zeros(4, 48)
            torch.ops.sparsekd.linear_grad_values(grad, x, blocks.row_ptr, weight["col_idx"], 16, 1)
