"""norm_relu, the op and the layer: against torch's batch norm, sum and ReLU one after the other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from benchmarks.lib.models import norms_by_torch
from sparsekd import backends, models
from sparsekd.nn import NormReLU
from sparsekd.nn import norm_relu as layer
from sparsekd.ops import norm_relu
from sparsekd.ops.norm_relu import norm_relu_grad_reference

from .cases import torch_threads
from .test_attention import every_isa, isa  # noqa: F401

SHAPES = [(2, 1, 1, 1), (3, 5, 2, 3), (7, 16, 4, 4), (5, 33, 9, 3), (4, 64, 16, 16)]
EPS = 1e-3
needs_kernels = pytest.mark.skipif(backends.cpu.native is None, reason=backends.cpu.missing)


def operands(shape, dtype=torch.float32, layout=torch.channels_last, with_residual=True, seed=0):
    """x, weight, bias and residual, all of which want a gradient; channel 0 has a mean of many deviations."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    x = randn(*shape)
    x[:, 0] += 50
    maps = [x, randn(shape[1]), randn(shape[1]), randn(*shape) if with_residual else None]
    made = [None if one is None else one.to(dtype) for one in maps]
    return [
        None if one is None else (one.contiguous(memory_format=layout) if one.dim() == 4 else one).requires_grad_()
        for one in made
    ]


def in_three(x, weight, bias, residual):
    """By torch."""
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    return F.relu(y if residual is None else y + residual)


def results(compute, given, grad):
    wanted = [one for one in given if one is not None]
    y = compute(*given)
    return y, *torch.autograd.grad(y, wanted, grad.to(y))


def ours(x, weight, bias, residual):
    return norm_relu(x, weight, bias, EPS, residual)[0]


@every_isa
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_three_ops(shape, with_residual, isa):  # noqa: F811
    given = operands(shape, with_residual=with_residual)
    exact = [None if one is None else one.detach().double().requires_grad_() for one in given]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got, want = results(ours, given, grad), results(in_three, exact, grad)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert got[0].is_contiguous(memory_format=torch.channels_last) and got[1].stride() == given[0].stride()
    _, mean, variance = norm_relu(*given[:3], EPS, given[3])
    torch.testing.assert_close(mean.double(), exact[0].mean((0, 2, 3)))
    torch.testing.assert_close(variance.double(), exact[0].var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-6)


@every_isa
def test_the_bits_are_the_same_for_every_number_of_threads(isa):  # noqa: F811
    given = operands((9, 40, 13, 11))
    grad = torch.randn_like(given[0])
    found = []
    for threads in (1, 2, 3, 5):
        with torch_threads(threads):
            found.append(results(ours, given, grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_other_types_and_layouts(layout, dtype):
    given = operands((4, 6, 5, 3), dtype, layout)
    grad = torch.randn(4, 6, 5, 3)
    got, want = results(ours, given, grad), results(in_three, given, grad)
    tolerance = {torch.float64: 1e-9}.get(dtype, 0.05)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_a_layout_between_two_is_taken():
    """Every second pixel of a map: neither contiguous nor channels_last."""
    (x, weight, bias, _), grad = operands((3, 4, 6, 8)), torch.randn(3, 4, 6, 4)
    given = [x[..., ::2], weight, bias, None]
    for mine, theirs in zip(results(ours, given, grad), results(in_three, given, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@needs_kernels
def test_a_gradient_in_another_layout():
    given = operands((3, 8, 4, 4))
    grad = torch.randn(3, 8, 4, 4)
    other = results(ours, given, grad.contiguous(memory_format=torch.channels_last))
    for mine, theirs in zip(results(ours, given, grad), other, strict=True):
        assert torch.equal(mine, theirs)
    summed = torch.autograd.grad(ours(*given).sum(), given[0])[0]  # whose gradient has strides of 0
    torch.testing.assert_close(summed, torch.autograd.grad(in_three(*given).sum(), given[0])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_gradcheck(with_residual):
    given = operands((3, 2, 2, 3), torch.float64, with_residual=with_residual)
    assert gradcheck(ours, given)
    assert gradgradcheck(ours, given)


@needs_kernels
def test_a_second_derivative_behind_the_kernel():
    given = operands((3, 5, 4, 4))

    def penalty(compute):
        (grad,) = torch.autograd.grad((compute(*given) ** 2).sum(), given[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), given)

    for mine, theirs in zip(penalty(ours), penalty(in_three), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def twice_through_one_norm(x, weight, bias, compute):
    return compute(compute(x, weight, bias, None), weight, bias, None)


def weight_of_x(x, weight, bias, compute):
    return compute(x, x.mean((0, 2, 3)) + weight, bias, None)


@needs_kernels
@pytest.mark.parametrize("network", [twice_through_one_norm, weight_of_x])
def test_gradients_with_a_graph_where_operands_depend_on_each_other(network):
    given = operands((3, 5, 4, 4), with_residual=False)[:3]
    grads = [
        torch.autograd.grad(network(*given, compute).square().sum(), given, create_graph=True)
        for compute in (ours, in_three)
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_nan_and_infinity_pass_as_they_do_in_torch():
    x, weight, bias, residual = operands((4, 18, 3, 3))
    with torch.no_grad():
        x[1, 2, 0, 0], residual[0, 4, 1, 1], residual[0, 5, 1, 1] = float("nan"), float("nan"), float("-inf")
    given, grad = (x, weight, bias, residual), torch.randn(4, 18, 3, 3)
    for mine, theirs in zip(results(ours, given, grad), results(in_three, given, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_opcheck(with_residual):
    x, weight, bias, residual = operands((2, 3, 4, 4), with_residual=with_residual)
    torch.library.opcheck(torch.ops.sparsekd.norm_relu.default, (x, weight, bias, EPS, residual))
    permuted = torch.randn(2, 3, 4, 5).mT.requires_grad_()
    torch.library.opcheck(torch.ops.sparsekd.norm_relu.default, (permuted, weight, bias, EPS, None))
    y, mean, variance = (t.detach() for t in norm_relu(x, weight, bias, EPS, residual))
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    known = (torch.randn_like(y), x, y if with_residual else None, weight, bias, mean, variance, EPS)
    torch.library.opcheck(torch.ops.sparsekd.norm_relu_grad.default, known)
    for mine, theirs in zip(torch.ops.sparsekd.norm_relu_grad(*known), norm_relu_grad_reference(*known), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.randn(3, 4)}, ValueError, r"x must be \[B, C, H, W\], got \(3, 4\)"),
        ({0: torch.randn(1, 4, 1, 1)}, ValueError, "two values or more for a variance"),
        ({1: torch.randn(3)}, ValueError, r"weight must be \(4,\), got \(3,\)"),
        ({3: torch.randn(2, 4, 3, 1)}, ValueError, r"residual must be \(2, 4, 3, 3\), got \(2, 4, 3, 1\)"),
        ({2: torch.randn(4).double()}, TypeError, "one dtype, got torch.float32 and torch.float64"),
        ({i: torch.ones((2, 4, 3, 3) if i % 3 == 0 else 4).int() for i in range(4)}, TypeError, "floating point"),
    ],
)
def test_bad_input_is_refused(changed, error, message):
    given = operands((2, 4, 3, 3))
    for place, other in changed.items():
        given[place] = other
    if 0 in changed and 3 not in changed:
        given[3] = None
    with pytest.raises(error, match=message):
        ours(*given)


# The layer.


class Block(nn.Module):
    """A residual block with either kind of ReLU; the parameters have the same names."""

    def __init__(self, with_norm, **options):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6, **options)
        self.relu = NormReLU() if with_norm else nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        return self.relu(y, self.norm, x) if isinstance(self.relu, NormReLU) else self.relu(self.norm(y) + x)


def twins(**options):
    """Two blocks in channels_last with the same weights."""
    torch.manual_seed(0)
    one = Block(with_norm=True, **options)
    other = Block(with_norm=False, **options)
    other.load_state_dict(one.state_dict())
    return [block.to(memory_format=torch.channels_last) for block in (one, other)]


def images(seed=0, dtype=torch.float32):
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch):
    """How often the op has been called by layers."""
    seen = []
    monkeypatch.setattr(layer, "norm_relu", lambda *args: seen.append(args) or norm_relu(*args))
    return seen


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1}], ids=str)
def test_training_by_the_layer_is_training_by_three(options, calls):
    blocks = twins(**options)
    for step in range(3):
        outputs = [block(images(step)) for block in blocks]
        torch.testing.assert_close(*outputs)
        for y in outputs:
            y.square().sum().backward()
    for (name, mine), theirs in zip(blocks[0].named_parameters(), blocks[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    torch.testing.assert_close(blocks[0].state_dict(), blocks[1].state_dict())
    assert len(calls) == 3
    torch.testing.assert_close(blocks[0].eval()(images(9)), blocks[1].eval()(images(9)))
    assert len(calls) == 3  # none in evaluation


class MyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def exchange_forward(norm):
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) * 2


OTHERS = {
    "a norm of one's own": lambda block: setattr(block, "norm", MyNorm(6)),
    "without weights": lambda block: setattr(block, "norm", nn.BatchNorm2d(6, affine=False)),
    "a hook": lambda block: block.norm.register_forward_hook(lambda module, args, y: y * 2),
    "a hook before": lambda block: block.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a hook backwards": lambda block: block.norm.register_full_backward_hook(lambda module, grad_x, grad_y: None),
    "another forward": lambda block: exchange_forward(block.norm),
    "nothing counted": lambda block: setattr(block.norm, "num_batches_tracked", None),
    "no averages": lambda block: (setattr(block.norm, "running_mean", None), setattr(block.norm, "running_var", None)),
    "no norm at all": lambda block: setattr(block, "norm", nn.Identity()),
    "frozen": lambda block: block.norm.eval(),
    "float64": lambda block: block.double(),
    "switched off": lambda block: setattr(block.relu, "one_op", False),
}


@pytest.mark.parametrize("change", OTHERS)
def test_everything_else_runs_as_three(change, calls):
    blocks = twins()
    for block in blocks:
        OTHERS[change](block)
    x = images(dtype=blocks[0].conv.weight.dtype)
    torch.testing.assert_close(blocks[0](x), blocks[1](x))
    assert not calls


def test_a_hook_for_all_modules_sees_the_norm():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        twins()[0](images())
    finally:
        handle.remove()
    assert nn.BatchNorm2d in seen


def test_forward_mode_differentiation():
    block, other = twins()
    x, tangent = images(), images(seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got, want = (torch.autograd.forward_ad.unpack_dual(one(dual)).tangent for one in (block, other))
    torch.testing.assert_close(got, want)


def test_without_a_norm_it_is_relu_of_a_sum():
    x = images()
    assert torch.equal(NormReLU()(x), x.relu())
    assert torch.equal(NormReLU()(x, residual=x), (x + x).relu())


def test_torchscript_names_the_way_out():
    with pytest.raises(RuntimeError, match=r"NormReLU: TorchScript cannot compile .* torch\.jit\.trace"):
        torch.jit.script(twins()[0])


def test_a_stem_is_a_sequence_as_any_other():
    network = models.ResNet((1, 1), 5, (8, 16)).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network.stem[2](network.stem[:2](x)), network.stem(x))
    network.stem.append(nn.Identity())
    torch.testing.assert_close(network.stem(x), network.stem[:2](x).relu())


def test_sync_batch_norm_finds_the_norm():
    """A class that were both would lose its ReLU."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(twins()[0])
    assert type(block.norm) is nn.SyncBatchNorm and type(block.relu) is NormReLU
    assert block.eval()(images()).min().item() >= 0


@needs_kernels
def test_in_graphs(calls, fresh_compiler):
    block, other = twins()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), other(images()))
    torch.testing.assert_close(block.state_dict(), other.state_dict())
    traced = torch.fx.symbolic_trace(block)
    torch.testing.assert_close(traced(images()), other(images()))

    def loss(parameters):
        return torch.func.functional_call(block, parameters, images()).square().sum()

    held = {name: parameter.detach() for name, parameter in block.named_parameters()}
    block.norm.track_running_stats = False  # no buffer may change under torch.func
    grads = torch.func.grad(loss)(held)
    other.zero_grad()
    other(images()).square().sum().backward()
    torch.testing.assert_close(grads["conv.weight"], other.conv.weight.grad, rtol=1e-3, atol=1e-3)
    assert not calls


@needs_kernels
@pytest.mark.parametrize("name", ["wrn-16-2", "resnet-18"])
def test_our_networks_train_by_it(name, calls):
    torch.manual_seed(1)
    network = models.classifier(name, classes=5).to(memory_format=torch.channels_last).train()
    plain = norms_by_torch(copy.deepcopy(network))
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-3, atol=1e-4)
    relus = sum(isinstance(module, NormReLU) for module in network.modules())
    assert len(calls) == relus >= 13
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
