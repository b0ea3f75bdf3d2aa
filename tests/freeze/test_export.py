"""Frozen networks under what records a call: refused, with the way out, which gives the same answers."""

import inspect
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
    shapes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(plain, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        want = frozen(x)
        for module in (plain, traced, *([exported.module()] if batch > 1 else [])):
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


def test_onnx_takes_the_way_out(frozen, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    given = {"dynamic_shapes": ({0: torch.export.Dim("n")},), "dynamo": True, "verbose": False}
    torch.onnx.export(frozen.to_torch(), (torch.randn(2, 3, 8, 8),), tmp_path / "net.onnx", **given)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), frozen(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match=r"export frozen\.to_torch\(\)"):
        torch.onnx.export(frozen, (torch.randn(2, 3, 8, 8),), tmp_path / "other.onnx", dynamo=True, verbose=False)


def test_openvino_takes_the_way_out(frozen):
    openvino = pytest.importorskip("openvino")
    network = openvino.convert_model(frozen.to_torch(), example_input=torch.randn(2, 3, 8, 8))
    compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), frozen(x), rtol=1e-4, atol=1e-5)


class Named(nn.Module):
    """torch.fx cannot trace its path."""

    def __init__(self, result):
        super().__init__()
        self.fc, self.result = nn.Linear(8, 4), result

    def forward(self, words, scale=None):
        y = self.fc(words) if words.shape[1] == 8 else words
        return self.result(y if scale is None else y * scale)


@pytest.mark.parametrize("result", [lambda y: y, lambda y: {"a": y, "b": [y + 1]}, lambda y: (y, None)])
def test_the_way_out_keeps_names_and_structure(result):
    model, given = Named(result).eval(), (torch.randn(2, 8), torch.randn(2, 4))
    frozen = quick(model, given)
    assert frozen.record["traced"] == "torch.export"
    plain = frozen.to_torch()
    if result(0) != (0, None):  # which no graph can give
        assert list(inspect.signature(plain.forward).parameters) == ["words", "scale"]
    torch.testing.assert_close(plain(*given), frozen(*given), rtol=1e-4, atol=1e-5)


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
