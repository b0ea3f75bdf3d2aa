"""Frozen networks under what records a call: refused, with the way out, which gives the same answers."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import sparsekd

from .networks import Custom, quick, trained


class Net(nn.Module):
    """A norm that is folded and one that is not, a residual, padding of its own, both kinds of pooling, activations."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.one = nn.Conv2d(3, 32, 3, padding="same", padding_mode="reflect", bias=False)
        self.norm, self.two = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.norm(self.one(self.first(x)))), 2)
        x = F.silu(self.two(x) + x)
        return F.hardswish(self.head(x.mean((2, 3))))


@pytest.fixture
def frozen():
    torch.manual_seed(0)
    return quick(sparsekd.sparsify(trained(Net()), density=0.3), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    "record",
    [
        lambda f, x: torch.jit.trace(f, x),
        lambda f, x: torch.onnx.export(f, (x,), "/dev/null", dynamo=False),
        lambda f, x: make_fx(f)(x),
        lambda f, x: make_fx(f, tracing_mode="fake")(x),
        lambda f, x: torch.export.export(f, (x,), strict=False),
        lambda f, x: torch.func.vmap(f)(x[None]),
    ],
    ids=["jit.trace", "onnx", "make_fx", "fake", "export", "vmap"],
)
def test_what_records_is_refused(frozen, record):
    with pytest.raises(Exception, match=r"frozen\.to_torch\(\)|onnx"):
        record(frozen, torch.randn(1, 3, 8, 8))


def test_the_way_out_gives_the_same_answers(frozen):
    plain = frozen.to_torch()
    traced = torch.jit.trace(plain, torch.randn(1, 3, 8, 8))
    shapes = (({0: torch.export.Dim.AUTO},),)
    exported = torch.export.export(plain, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        want = frozen(x)
        for module in (plain, traced, *([exported.module()] if batch > 1 else [])):
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


def test_the_way_out_of_a_network_that_keeps_its_forward():
    model = Custom(lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else m.conv(x)).eval()
    x = torch.rand(2, 16, 5, 5)
    plain = quick(model, x).to_torch()
    for sign in (1, -1):
        torch.testing.assert_close(plain(sign * x), model(sign * x).detach(), rtol=1e-4, atol=1e-5)


def test_torch_compile_calls_it_as_it_is(frozen):
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(torch.compile(frozen, backend="eager")(x), frozen(x))


def test_pickle_says_what_to_do(frozen):
    with pytest.raises(TypeError, match=r"save\(path\) and read it with sparsekd\.load_frozen"):
        pickle.dumps(frozen)
