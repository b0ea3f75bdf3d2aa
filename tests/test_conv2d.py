"""conv2d: forward and both gradients against float64 torch, every case, both layouts; registration; bad input."""

import random

import pytest
import torch
import torch.nn.functional as F

from sparsekd import BlockPattern, BlockSparse, ops
from sparsekd.backends.cpu import native

from .cases import CONVS, Conv, random_weight, torch_threads

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def operands(case: Conv, dtype=torch.float32, memory_format=torch.contiguous_format):
    """(x, blocks, bias) of the case, seeded."""
    blocks, _ = random_weight(case, dtype)
    x = torch.randn(case.n, case.c, *case.image, dtype=dtype).contiguous(memory_format=memory_format)
    return x, blocks, torch.randn(case.k, dtype=dtype)


def run(case: Conv, x, blocks: BlockSparse, values, bias):
    geometry = {"out_channels": case.k, "kernel_size": case.kernel, **case.geometry}
    return ops.conv2d(x, values, blocks.row_ptr, blocks.col_idx, bias, **geometry)


def assert_gradients_agree(case: Conv, x, blocks: BlockSparse, bias, grad=None):
    """Output and gradients of x, values and bias against float64 torch on the dense weight."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    values = blocks.values.clone().requires_grad_()
    y = run(case, x, blocks, values, bias)
    x64, b64 = (t.detach().double().contiguous().requires_grad_() for t in (x, bias))
    w64 = blocks.to_dense().double().requires_grad_()
    y64 = F.conv2d(x64, w64, b64, **case.geometry)
    grad = torch.randn_like(y64) if grad is None else grad
    y.backward(grad.to(y.dtype))
    y64.backward(grad)
    want_values = BlockSparse.from_dense(w64.grad, case.pattern, mask=blocks.mask()).values
    close = {"rtol": 1e-5, "atol": 1e-4} if x.dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y.double(), y64, **close)
    torch.testing.assert_close(x.grad.double(), x64.grad, **close)
    # A running float32 sum of n products of unit normals is off by 2^-24 n / sqrt(6) (deviation); six of them.
    rounding = 1.5e-7 * y64.numel() / case.k if x.dtype == torch.float32 else 0.0
    torch.testing.assert_close(values.grad.double(), want_values, rtol=close["rtol"], atol=max(close["atol"], rounding))
    torch.testing.assert_close(bias.grad.double(), b64.grad, **close)
    return y


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_forward_and_gradients(case, memory_format):
    x, blocks, bias = operands(case, memory_format=FORMATS[memory_format])
    y = assert_gradients_agree(case, x, blocks, bias)
    assert y.is_contiguous(memory_format=FORMATS[memory_format]) or 0 in y.shape


@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_float64_runs_on_the_reference(case):
    x, blocks, bias = operands(case, torch.float64)
    assert_gradients_agree(case, x, blocks, bias)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", [CONVS[0], CONVS[4], CONVS[8]], ids=lambda case: case.id)
def test_any_number_of_threads(case, threads):
    with torch_threads(threads):
        assert_gradients_agree(case, *operands(case))


# By strips, by bands, and a pixel where it lies. The gradient of a 3 x 3 layer's input is cut where there are threads.
@pytest.mark.parametrize("shape", [(2, 48, 9, 9, 3), (3, 8, 40, 40, 3), (1, 200, 1, 1, 1)], ids=str)
def test_results_do_not_depend_on_threads(shape):
    n, c, h, w, kernel = shape
    same = {"kernel": (kernel, kernel), "padding": (kernel // 2, kernel // 2)}
    case = Conv("threads", n=n, c=c, image=(h, w), k=144, density=0.4, **same)
    x, blocks, bias = operands(case, memory_format=torch.channels_last)
    results = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            x, values = x.detach().requires_grad_(), blocks.values.detach().requires_grad_()
            y = run(case, x, blocks, values, bias)
            grad_values, grad_x = torch.autograd.grad(y.square().sum(), [values, x])
            results.append([y, grad_values] + [grad_x] * (kernel == 1))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("channels", [(4, 16), (16, 4)], ids=str)
def test_large_outputs_that_are_written_past_the_caches(channels):
    c, k = channels
    case = Conv("large", n=17, c=c, image=(128, 128), k=k, kernel=(1, 1), padding=(0, 0), density=0.6)
    assert_gradients_agree(case, *operands(case, memory_format=torch.channels_last))


def random_conv(seed: int) -> Conv:
    """Any layer the op takes, small."""
    pick = random.Random(seed)
    pattern = BlockPattern(*pick.choice([(16, 1)] * 4 + [(32, 1), (16, 2), (16, 4), (8, 1), (4, 4), (1, 1), (5, 3)]))
    groups = pick.choice([1, 1, 1, 2, 3])
    k = pattern.bh * pick.randint(1, 3) * groups if groups > 1 else pick.randint(1, 100)
    kernel, padding = ((pick.randint(1, 4), pick.randint(1, 4)), (pick.randint(0, 3), pick.randint(0, 3)))
    if pick.random() < 0.3:
        kernel, padding = (1, 1), (0, 0)
    stride, dilation = ((pick.choice([1, 1, 2, 3]), pick.choice([1, 1, 2, 3])) for _ in range(2))
    span = [d * (r - 1) + 1 - 2 * pad for r, d, pad in zip(kernel, dilation, padding, strict=True)]
    image = (max(1, span[0], pick.randint(1, 16)), max(1, span[1], pick.randint(1, 34)))
    return Conv(
        f"seed-{seed}", n=pick.choice([0, 1, 1, 2, 3, 9]), c=groups * pick.randint(1, 40), k=k, image=image,
        kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, pattern=pattern,
        density=pick.choice([0.0, 0.05, 0.2, 0.5, 0.9, 1.0]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "last"), [(0, 80), *(pytest.param(i, i + 200, marks=pytest.mark.slow) for i in range(80, 2080, 200))]
)
@pytest.mark.parametrize("isa", native.isas() if native else [])
def test_random_layers(isa, first, last):
    before = native.isa()
    native.use_isa(isa)
    try:
        for seed in range(first, last):
            case = random_conv(seed)
            torch.manual_seed(seed)
            x, blocks, bias = operands(case, memory_format=FORMATS[("contiguous", "channels_last")[seed % 2]])
            try:
                assert_gradients_agree(case, x, blocks, bias)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error
    finally:
        native.use_isa(before)


def test_inputs_and_gradients_need_not_be_contiguous():
    case = Conv("plain")
    x, blocks, bias = operands(case)
    strided = torch.randn(case.n, case.c, *reversed(case.image)).transpose(2, 3)[:, :, ::1]
    assert_gradients_agree(case, strided, blocks, bias)
    expanded = torch.ones(1, 1, 1, 1, dtype=torch.float64).expand(case.n, case.k, *case.image)
    assert_gradients_agree(case, x, blocks, bias, grad=expanded)


def test_two_runs_are_bit_equal():
    case = Conv("larger", n=4, c=32, k=64, image=(16, 16))
    x, blocks, bias = operands(case)
    results = []
    for _ in range(2):
        values = blocks.values.clone().requires_grad_()
        y = run(case, x.requires_grad_(), blocks, values, bias)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, values))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_as_exact_as_torch(dtype):
    """y and the gradients of x and of the kept values."""
    case = Conv("half", c=32)
    x, blocks, bias = (t if isinstance(t, BlockSparse) else t.to(dtype) for t in operands(case))
    values, dense = blocks.values.to(dtype), blocks.to_dense().to(dtype)
    grad = torch.randn(case.n, case.k, *case.image).to(dtype)

    def kept(gradient):
        return BlockSparse.from_dense(gradient, case.pattern, mask=blocks.mask()).values

    def answers(function, x, weight, bias):
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(x, weight, bias)
        return [t.double() for t in (y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(y.dtype)))]

    def theirs(*tensors):
        y, dx, dweight = answers(lambda x, w, b: F.conv2d(x, w, b, **case.geometry), *tensors)
        return y, dx, kept(dweight)

    exact, torch_answers = theirs(x.double(), dense.double(), bias.double()), theirs(x, dense, bias)
    ours = answers(lambda x, v, b: run(case, x, blocks, v, b), x, values, bias)
    for got, want, limit in zip(ours, exact, torch_answers, strict=True):
        assert (got - want).abs().max() <= 2 * (limit - want).abs().max() + 1e-6


@pytest.mark.parametrize("case", [CONVS[0], CONVS[4], CONVS[20], CONVS[23]], ids=lambda case: case.id)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(case, memory_format):
    x, blocks, bias = operands(case, memory_format=FORMATS[memory_format])
    arguments = (x.requires_grad_(), blocks.values.requires_grad_(), blocks.row_ptr, blocks.col_idx, bias)
    geometry = (case.k, case.kernel, case.stride, case.padding, case.dilation, case.groups)
    torch.library.opcheck(torch.ops.sparsekd.conv2d.default, (*arguments, *geometry))


def test_gradcheck():
    case = Conv("tiny", n=1, c=3, k=5, image=(4, 3), pattern=BlockPattern(2, 2), density=0.5)
    x, blocks, bias = operands(case, torch.float64)
    inputs = (x.requires_grad_(), blocks.values.requires_grad_(), bias.requires_grad_())
    # Padding of ragged blocks takes no part in the product: move only what lies inside the weight.
    inside = BlockSparse.from_dense(torch.ones(case.weight_shape), case.pattern, mask=blocks.mask()).values.double()
    assert torch.autograd.gradcheck(lambda x, v, b: run(case, x, blocks, v * inside, b), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [CONVS[0], CONVS[4], CONVS[6], CONVS[20]], ids=lambda case: case.id)
def test_a_gradient_penalty_has_the_gradient_of_the_dense_layer(case, dtype):
    """Double backward: the squared norm of the input's gradient, differentiated once more."""
    x, blocks, bias = operands(case, dtype)
    x.requires_grad_()
    values, dense = blocks.values.clone().requires_grad_(), blocks.to_dense().requires_grad_()
    found = []
    for output, weight in (
        (run(case, x, blocks, values, bias), values),
        (F.conv2d(x, dense, bias, **case.geometry), dense),
    ):
        (grad,) = torch.autograd.grad(output.square().mean(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (x, weight)))
    want = BlockSparse.from_dense(found[1][1], case.pattern, mask=blocks.mask()).values
    torch.testing.assert_close(found[0], (found[1][0], want), rtol=1e-3, atol=1e-4)


def good():
    case = Conv("plain")
    x, blocks, bias = operands(case)
    return {
        "x": x,
        "values": blocks.values,
        "row_ptr": blocks.row_ptr,
        "col_idx": blocks.col_idx,
        "bias": bias,
        "out_channels": case.k,
        "kernel_size": case.kernel,
        **case.geometry,
    }


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(16, 8, 8)}, ValueError, r"input must be \[N, C, H, W\]"),
        ({"x": torch.zeros(2, 16, 8, 8).double()}, TypeError, "one dtype"),
        ({"bias": torch.zeros(31)}, ValueError, r"bias must have shape \(32,\), got \(31,\)"),
        ({"row_ptr": torch.zeros(3, dtype=torch.int64)}, TypeError, "row_ptr must be int32"),
        ({"row_ptr": torch.zeros(5, dtype=torch.int32)}, ValueError, r"need row_ptr of shape \(3,\), got \(5,\)"),
        ({"col_idx": torch.zeros(1, dtype=torch.int32)}, ValueError, "one entry for each"),
        ({"values": torch.zeros(3, 16)}, ValueError, r"values must be \[nnzb, bh, bw\]"),
        ({"stride": (0, 1)}, ValueError, "stride must be two positive ints"),
        ({"padding": (-1, 1)}, ValueError, "padding must be two ints >= 0"),
        ({"groups": 3}, ValueError, "multiples of groups = 3"),
        ({"groups": 4}, ValueError, "multiple of the block height 16"),
        ({"kernel_size": (11, 11)}, ValueError, "does not fit an image"),
    ],
)
def test_bad_input(change, error, says):
    with pytest.raises(error, match=says):
        ops.conv2d(**{**good(), **change})
