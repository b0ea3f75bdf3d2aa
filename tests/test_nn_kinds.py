"""The layers beside SparseConv2d and SparseLinear: against torch's in float64, forward and every gradient."""

import copy

import pytest
import torch
from torch import nn

from sparsekd import BlockPattern
from sparsekd.nn import SparseConv1d, SparseConv3d, SparseConvTranspose2d

CONV1D = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2, "bias": False},
    {"padding": "same", "kernel_size": 4},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular", "stride": 3},
    {"groups": 2},
    {"kernel_size": 1},
]
TRANSPOSED = [
    {},
    {"stride": 2},
    {"stride": (2, 3), "padding": (1, 0), "bias": False},
    {"stride": 2, "output_padding": 1, "padding": 1},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": (4, 2), "stride": 2, "padding": 1, "output_padding": (1, 0)},
    {"dilation": 2, "padding": 3},
    {"dilation": 3, "stride": 2, "output_padding": (2, 1)},
    {"groups": 2, "stride": 2},
]
CONV3D = [{}, {"stride": (1, 2, 3)}, {"padding": (1, 0, 2), "bias": False}, {"groups": 2}, {"padding": "same"}]
KINDS = [
    *((SparseConv1d, {"kernel_size": 3, **arguments}, (2, 32, 17)) for arguments in CONV1D),
    *((SparseConvTranspose2d, {"kernel_size": 3, **arguments}, (2, 32, 5, 6)) for arguments in TRANSPOSED),
    *((SparseConv3d, {"kernel_size": 1, **arguments}, (2, 32, 3, 5, 4)) for arguments in CONV3D),
]
PATTERN = BlockPattern(8, 3)


def dense_and_sparse(kind, arguments):
    """A torch layer of float64 whose weight is zero outside a random mask, and its block-sparse twin."""
    dense = kind.dense_type(32, 48, **arguments, dtype=torch.float64)
    whole = kind.from_dense(dense, PATTERN)
    mask = torch.rand(whole.block_mask().shape, generator=torch.Generator().manual_seed(1)) < 0.4
    sparse = kind.from_dense(dense, PATTERN, mask=mask)
    assert torch.equal(sparse.block_mask(), mask)
    return sparse.to_dense(), sparse


@pytest.mark.parametrize(("kind", "arguments", "shape"), KINDS, ids=str)
def test_forward_and_gradients_are_those_of_torch(kind, arguments, shape):
    dense, sparse = dense_and_sparse(kind, arguments)
    assert 0.3 < sparse.density < 0.5
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        given[1].copy_(given[0])
    outputs = [layer(x) for layer, x in zip((dense, sparse), given, strict=True)]
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(given[1].grad, given[0].grad)
    if sparse.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    kept = copy.deepcopy(sparse)
    with torch.no_grad():
        kept.values.copy_(sparse.values.grad)
    torch.testing.assert_close(kept.weight, dense.weight.grad * (dense.weight != 0))
    torch.testing.assert_close(sparse(given[0][0]), dense(given[0][0]))  # without the batch


@pytest.mark.parametrize(("kind", "arguments", "shape"), KINDS, ids=str)
def test_they_convert_there_and_back_and_describe_themselves(kind, arguments, shape):
    dense, sparse = dense_and_sparse(kind, arguments)
    assert torch.equal(sparse.weight, dense.weight)
    again = kind.from_dense(dense, PATTERN, mask=sparse.block_mask())
    assert torch.equal(again.values, sparse.values)
    assert again.weight_shape == tuple(dense.weight.shape)
    assert sparse.num_weights == dense.weight.numel()
    assert sparse.num_kept == int((dense.weight != 0).sum())
    described = repr(dense).split("(", 1)[1].split(", bias=")[0].split(", padding_mode=")[0].rstrip(")")
    assert all(part in repr(sparse) for part in described.split(", "))
    built = kind(32, 48, **arguments, density=0.5, pattern=PATTERN)
    assert built(torch.randn(shape)).shape == dense.float()(torch.randn(shape)).shape
    assert built.density == pytest.approx(0.5, abs=0.1)  # a share of the blocks, and some are ragged


@pytest.mark.parametrize(("kind", "arguments", "shape"), KINDS, ids=str)
def test_dead_outputs_are_those_that_no_weight_reaches(kind, arguments, shape):
    _, sparse = dense_and_sparse(kind, arguments)
    few = torch.zeros_like(sparse.col_idx, dtype=torch.bool)
    few[[0, len(few) // 2, -1]] = True
    sparse.keep_(few)
    output = sparse(torch.randn(shape, dtype=torch.float64))
    if sparse.bias is not None:
        output = output - sparse.bias.view(-1, *(1,) * (len(shape) - 2))
    silent = (output.abs() < 1e-12).transpose(0, 1).flatten(1).all(1)
    assert torch.equal(sparse.dead_outputs(), silent)
    assert 0 < int(silent.sum()) < 48


def test_a_transposed_convolution_takes_the_output_size_that_is_asked_for():
    dense, sparse = dense_and_sparse(SparseConvTranspose2d, {"kernel_size": 3, "stride": 3})
    x = torch.randn(2, 32, 4, 5, dtype=torch.float64)
    for size in ((12, 15), (14, 17), (2, 48, 13, 16)):
        torch.testing.assert_close(sparse(x, output_size=size), dense(x, output_size=list(size)))
    with pytest.raises(ValueError, match=r"between \(12, 15\) and \(14, 17\) .* got \(15, 15\)"):
        sparse(x, output_size=(15, 15))


@pytest.mark.parametrize("kind", [SparseConv1d, SparseConv3d, SparseConvTranspose2d])
def test_channels_last_and_bfloat16(kind):
    size = 1 if kind is SparseConv3d else 3
    layer = kind(32, 48, size, density=0.5)
    x = torch.randn({SparseConv1d: (2, 32, 9), SparseConv3d: (2, 32, 3, 4, 5)}.get(kind, (2, 32, 6, 7)))
    want = layer(x)
    if kind is not SparseConv1d:
        last = torch.channels_last_3d if kind is SparseConv3d else torch.channels_last
        y = layer(x.contiguous(memory_format=last))
        assert y.is_contiguous(memory_format=last)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: SparseConv3d(8, 32, 3), ValueError, r"only 1x1x1 kernels .* got \(3, 3, 3\)"),
        (lambda: SparseConv1d(8, 32, 3, groups=4), ValueError, "outputs of a group must be a multiple"),
        (lambda: SparseConvTranspose2d(32, 8, 3, groups=4), ValueError, "inputs of a group must be a multiple"),
        (lambda: SparseConv1d(8, 32, 3)(torch.zeros(1, 7, 5)), ValueError, r"expected \[N, 8, L\]"),
        (lambda: SparseConv3d(8, 32, 1)(torch.zeros(1, 7, 5, 5, 5)), ValueError, r"expected \[N, 8, D, H, W\]"),
        (lambda: SparseConvTranspose2d(8, 32, 3)(torch.zeros(1, 7, 5, 5)), ValueError, r"expected \[N, 8, H, W\]"),
        (lambda: SparseConvTranspose2d(8, 32, 3, padding=9)(torch.zeros(1, 8, 5, 5)), ValueError, "leaves nothing"),
        (lambda: SparseConv1d.from_dense(nn.Conv2d(2, 2, 1)), TypeError, "expected nn.Conv1d, got Conv2d"),
    ],
)
def test_bad_input(build, error, says):
    with pytest.raises(error, match=says):
        build()


SAMPLES = {SparseConv1d: (2, 32, 9), SparseConv3d: (2, 32, 3, 4, 5), SparseConvTranspose2d: (2, 32, 6, 7)}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_they_are_compiled_exported_and_traced_for_any_batch(kind):
    torch.compiler.reset()
    layer = kind(32, 48, 1 if kind is SparseConv3d else 3, stride=2, density=0.5).eval()
    x, other = torch.randn(SAMPLES[kind]), torch.randn(5, *SAMPLES[kind][1:])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = layer(x)
    y.sum().backward()
    want = layer.values.grad.clone()
    layer.zero_grad()
    compiled(x).sum().backward()
    torch.testing.assert_close(layer.values.grad, want)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: batch}}).module()
    twins = [compiled, exported]
    if kind is SparseConvTranspose2d:
        with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot record a size .* use torch.export"):
            torch.jit.trace(layer, (x,))
    else:
        twins.append(torch.jit.trace(layer, (x,)))
    for twin in twins:
        torch.testing.assert_close(twin(other), layer(other))
