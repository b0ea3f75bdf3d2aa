"""FeatureTap: what it returns, what it leaves behind, layers that change under it, and torch.compile."""

import copy
import doctest
import gc
import weakref

import pytest
import torch
from torch import nn

from sparsekd import BlockPattern, sparsify, taps
from sparsekd.taps import FeatureTap

from .tapped import BACKEND, hooks, network


def test_tap_returns_the_output_and_the_features_in_the_order_of_names():
    model, x = network().eval(), torch.randn(2, 3, 8, 8)
    output, (second, first) = FeatureTap(model, ["1.2", "0.2"])(x)
    assert torch.equal(output, model(x))
    assert torch.equal(first, model[0](x))
    assert torch.equal(second, model[1](model[0](x)))


def test_tap_passes_keyword_arguments():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x, *, by):
            return self.relu(x) * by

    output, (feature,) = FeatureTap(Scale(), ["relu"])(torch.tensor([-1.0, 2.0]), by=3)
    assert output.tolist() == [0, 6] and feature.tolist() == [0, 2]


def test_tap_changes_neither_the_model_nor_its_names():
    model = network()
    before, modules = list(model.state_dict()), [type(m) for m in model.modules()]
    tap = FeatureTap(model, ["0.2", "1.2"])
    assert list(model.state_dict()) == before and [type(m) for m in model.modules()] == modules
    assert {id(p) for p in tap.parameters()} == {id(p) for p in model.parameters()}
    assert hooks(model) == 2
    tap.remove()
    assert hooks(model) == 0
    assert len(tap(torch.randn(2, 3, 8, 8))[1]) == 2  # hooks itself in again
    del tap
    gc.collect()
    assert hooks(model) == 0


def test_tap_keeps_no_features():
    model, x = network(), torch.randn(2, 3, 8, 8)
    tap = FeatureTap(model, ["0.2", "1.2"])
    output, taken = tap(x)
    alive = [weakref.ref(t) for t in taken]
    del output, taken
    model(x)  # an ordinary call of the model records nothing
    gc.collect()
    assert all(ref() is None for ref in alive)
    assert all(recorder.outputs is None for recorder in tap.recorders)


def test_tap_recovers_from_an_error_in_the_model():
    tap = FeatureTap(network(), ["0.2"])
    with pytest.raises(RuntimeError, match="expected input"):
        tap(torch.randn(2, 7, 8, 8))
    assert len(tap(torch.randn(2, 3, 8, 8))[1]) == 1


@pytest.mark.parametrize("replace", ["by hand", "sparsify"])
def test_tap_follows_layers_replaced_later(replace):
    model, x = network(16).eval(), torch.randn(2, 3, 8, 8)
    tap = FeatureTap(model, ["0.0", "1.2"])
    before, _ = tap(x)
    if replace == "by hand":
        new = nn.Conv2d(3, 16, 3, padding=1)
        new.load_state_dict(model[0][0].state_dict())
        model[0][0] = new
    else:
        sparsify(model, BlockPattern(16, 1))
    output, (first, second) = tap(x)
    torch.testing.assert_close(output, before)
    assert torch.equal(first, model[0][0](x))
    assert torch.equal(second, model[:2](x))
    assert hooks(model) == 2


def test_tap_says_when_a_layer_has_gone():
    model = network()
    tap = FeatureTap(model, ["1.2"])
    model[1] = nn.Conv2d(4, 8, 1)
    with pytest.raises(ValueError, match=r"no module named '1.2'; close matches"):
        tap(torch.randn(2, 3, 8, 8))


def test_two_taps_on_one_model():
    model, x = network().eval(), torch.randn(2, 3, 8, 8)
    one, two = FeatureTap(model, ["0.2"]), FeatureTap(model, ["0.2", "1.2"])
    assert torch.equal(one(x)[1][0], two(x)[1][0])
    del one
    gc.collect()
    assert hooks(model) == 2


def test_copied_tap_is_independent():
    tap = FeatureTap(network().eval(), ["0.2"])
    other = copy.deepcopy(tap)
    with torch.no_grad():
        other.model[0][0].weight.zero_()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x)[1][0], other.model[0](x))
    assert torch.equal(tap(x)[1][0], tap.model[0](x))


def test_tap_refuses_unknown_names():
    model = nn.Sequential()
    model.add_module("layer1", nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    with pytest.raises(ValueError, match=r"no module named 'layer1.2'; close matches: layer1"):
        FeatureTap(model, ["layer1.2"])
    with pytest.raises(ValueError, match=r"no module named 'zzz'; it has: layer1, layer1.0, layer1.1"):
        FeatureTap(model, ["zzz"])
    with pytest.raises(TypeError, match=r"got a string; use \['layer1'\]"):
        FeatureTap(model, "layer1")
    for names in ([], ["layer1", "layer1"]):
        with pytest.raises(ValueError, match="one or more different names"):
            FeatureTap(model, names)
    with pytest.raises(TypeError, match="compile the tap"):
        FeatureTap(torch.compile(model), ["layer1"])


class Awkward(nn.Module):
    """A shared ReLU, a layer that never runs, a layer that returns a pair, one whose output is overwritten."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU()
        self.unused = nn.ReLU()
        self.pair = nn.MaxPool2d(1, return_indices=True)
        self.relu_ = nn.ReLU(inplace=True)

    def forward(self, x):
        x, _ = self.pair(self.relu(self.relu(x)))
        return self.relu_(self.conv(x))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("relu", RuntimeError, "'relu' must run once in a forward pass, got 2 runs"),
        ("unused", RuntimeError, "'unused' must run once in a forward pass, got 0 runs"),
        ("pair", TypeError, "'pair' must return a tensor, got tuple"),
        ("conv", RuntimeError, "output of 'conv' was changed in place"),
    ],
)
def test_tap_refuses_what_it_cannot_record(name, error, message):
    with pytest.raises(error, match=message):
        FeatureTap(Awkward(), [name])(torch.randn(2, 3, 4, 4))


def test_tap_in_inference_mode():
    with torch.inference_mode():
        output, (feature,) = FeatureTap(network().eval(), ["1.2"])(torch.randn(2, 3, 8, 8))
    assert output.shape == (2, 5) and feature.shape == (2, 8, 4, 4)


def test_tap_compiles_in_one_graph_and_trains(fresh_compiler):
    eager, x = FeatureTap(network(), ["1.2", "0.2"]), torch.randn(4, 3, 8, 8)
    tap = FeatureTap(copy.deepcopy(eager.model), eager.names)
    compiled = torch.compile(tap, fullgraph=True, backend=BACKEND)
    results = []
    for call, module in ((eager, eager), (compiled, tap)):
        for _ in range(2):  # the second call reuses the graph
            module.zero_grad()
            output, taken = call(x)
            (output.square().sum() + sum(f.square().mean() for f in taken)).backward()
        results.append((output, taken, [p.grad for p in module.parameters()], list(module.model.buffers())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert all(recorder.outputs is None for recorder in tap.recorders)


def test_compiled_tap_refuses_replaced_layers_until_attached(fresh_compiler):
    model, x = network().eval(), torch.randn(2, 3, 8, 8)
    tap = FeatureTap(model, ["0.2", "1.2"])
    compiled = torch.compile(tap, fullgraph=True, backend="aot_eager")
    compiled(x)
    model[1][2] = nn.Sigmoid()
    with pytest.raises(Exception, match=r"call tap.attach\(\)"):
        compiled(x)
    tap.attach()
    torch.testing.assert_close(compiled(x)[1][1], model[:2](x))


def test_docstring_examples_run():
    result = doctest.testmod(taps)
    assert result.attempted > 0 and result.failed == 0
