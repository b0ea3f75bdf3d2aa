"""Frozen networks compute what the models did, and what a caller may rely on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd
from sparsekd.freeze import freeze, measure, network
from sparsekd.freeze.layer import FrozenLayer
from sparsekd.models import FeatureCNN, RatingCNN, Shape
from sparsekd.nn import SparseLinear

from .networks import (
    ALL_SPARSE,
    IMAGE,
    MODELS,
    Custom,
    ResNet,
    assert_frozen_equals,
    calls,
    gains,
    needs_kernels,
    quick,
    trained,
    wrong_in_threads,
)


@gains
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_outputs_are_those_of_the_model(name, memory_format, min_gain, monkeypatch):
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocate(*a, **k).fill_(float("nan")))  # all must be written
    build, shape = MODELS[name]
    model = sparsekd.sparsify(trained(build()), density=0.4)
    frozen = quick(model, torch.randn(shape), min_gain=min_gain, memory_format=memory_format)
    wanted = "sparse" if min_gain == ALL_SPARSE else "dense"
    assert {layer.chosen for layer in frozen.plan if layer.pattern} == {wanted}
    for batch in (1, 3, shape[0]):
        x = torch.randn(batch, *shape[1:])
        assert_frozen_equals(model, frozen, x)
        if x.dim() == 4:
            assert_frozen_equals(model, frozen, x.contiguous(memory_format=torch.channels_last))
    assert frozen(torch.randn(0, *shape[1:])).shape[0] == 0


@gains
def test_models_of_the_main_job(min_gain):
    sizes = {"users": 5, "items": 6, "user_features": 4, "item_features": 7, "features": 9}
    ratings = sparsekd.sparsify(trained(RatingCNN(sizes, Shape(), dropout=0.3)), density=0.3, include=["*conv*"])
    nn.init.normal_(ratings.cnn.head.weight)
    inputs = (torch.randn(3, 4), torch.randn(3, 7), torch.randn(3))
    frozen = quick(ratings, inputs, min_gain=min_gain)
    assert not {"BatchNorm2d", "ReLU", "Dropout"} & set(calls(frozen))
    assert_frozen_equals(ratings, frozen, *inputs)
    features = trained(FeatureCNN(sizes, Shape(), 0.5))
    nn.init.normal_(features.cnn.head.weight)  # it starts at zero, and so would hide what comes before it
    sparsekd.sparsify(features, density=0.3)
    assert_frozen_equals(features, quick(features, torch.randn(2, 9), min_gain=min_gain), torch.randn(5, 9))


# ---- What the caller may rely on


def test_the_model_is_left_as_it_was():
    model = sparsekd.sparsify(trained(ResNet()), density=0.4).train()
    model.stem.eval()
    x = torch.randn(IMAGE)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    quick(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_changes_its_input_leaves_the_example_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 16, 3))
    x = torch.randn(IMAGE)
    before = x.clone()
    quick(model, x)
    assert torch.equal(x, before)


@gains
def test_two_threads_at_once(min_gain):
    model = sparsekd.sparsify(trained(ResNet()), density=0.4)
    frozen = quick(model, torch.randn(IMAGE), min_gain=min_gain)
    batches = [torch.randn(batch, *IMAGE[1:]) for batch in (1, 2, 5, 3)]
    assert not wrong_in_threads(frozen, batches, turns=60)


def test_wrong_inputs_are_refused():
    frozen = quick(ResNet(), torch.randn(IMAGE))
    with pytest.raises(ValueError, match=r"expected an input of shape \[N, 3, \*, \*\], got \(2, 4, 12, 13\); freeze"):
        frozen(torch.randn(2, 4, 12, 13))
    with pytest.raises(ValueError, match="got "):
        frozen(torch.randn(3, 12, 12))
    with pytest.raises(TypeError, match=r"expected a torch.float32 tensor on the device .*, got torch.float64"):
        frozen(torch.randn(IMAGE).double())
    with pytest.raises(TypeError, match="expected 1 input tensors, got 2"):
        frozen(torch.randn(IMAGE), torch.randn(IMAGE))
    with pytest.raises(TypeError, match="got list"):
        frozen([1.0])


@needs_kernels
def test_a_layer_never_reads_memory_of_another_shape():
    """Inner shapes can change where those of the inputs do not; a kernel that trusted them would read past the end."""
    model = Custom(lambda m, x: m.conv(x.view(-1, 16, 4, 4)))
    frozen = quick(model, torch.randn(2, 16, 4, 4))
    layer = next(module for module in frozen.modules() if isinstance(module, FrozenLayer))
    with pytest.raises(ValueError, match=r"expected float32 \[N, 16, 4, 4\] on the CPU, got torch.float32 of shape"):
        layer(torch.randn(2, 8, 4, 4))
    x = torch.randn(2, 16, 4, 3)
    torch.testing.assert_close(layer(x), model.conv(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="expand"):
        layer(torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 3))
    with pytest.raises(TypeError, match="expected a float32 residual"):
        layer(torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4).double())
    with pytest.raises(TypeError, match="leave autocast"):
        layer(torch.randn(2, 16, 4, 4).bfloat16())
    linear = quick(SparseLinear(8, 16), torch.randn(2, 8)).network.get_submodule("0")
    with pytest.raises(ValueError, match=r"expected float32 \[..., 8\]"):
        linear(torch.randn(2, 9))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="memory_format must be one of"):
        freeze(ResNet(), torch.randn(IMAGE), memory_format="nhwc")
    with pytest.raises(TypeError, match="must be a tensor or several, got int"):
        freeze(ResNet(), (3,))
    with pytest.raises(ValueError, match="expected a model on the CPU like its inputs, got weight on meta"):
        freeze(nn.Linear(2, 2, device="meta"), torch.randn(1, 2))


@pytest.mark.parametrize("place", ["head.values", "blocks.0.bn1.weight", "blocks.0.bn1.running_var"])
def test_nan_weights_are_refused(place):
    model = sparsekd.sparsify(trained(ResNet()), density=0.4)
    model.state_dict()[place].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=rf"(NaN or infinity in .*{place.split('.')[0]}|the model gives NaN)"):
        quick(model, torch.randn(IMAGE))


def test_a_wrong_layer_is_named(monkeypatch):
    right = measure.fold

    def wrong(site, layer, norm):
        weight, bias = right(site, layer, norm)
        return weight, bias + 1 if site.name == "blocks.0.conv2" else bias

    monkeypatch.setattr(measure, "fold", wrong)
    with pytest.raises(RuntimeError, match=r"differ from the model's by .* first in blocks\.0\.conv2;"):
        quick(trained(ResNet()), torch.randn(IMAGE))


def test_a_model_that_is_random_in_eval_mode_is_refused():
    model = Custom(lambda m, x: F.dropout(m.conv(x)))
    with pytest.raises(RuntimeError, match="random in eval mode"):
        quick(model, torch.randn(1, 16, 5, 5))


def test_frozen_is_frozen():
    frozen = quick(ResNet(), torch.randn(IMAGE))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen(torch.randn(IMAGE).requires_grad_()).requires_grad
    assert frozen.eval() is frozen
    assert frozen.to("cpu") is frozen
    assert copy.deepcopy(frozen) is frozen
    with pytest.raises(RuntimeError, match="cannot train"):
        frozen.train()
    with pytest.raises(RuntimeError, match="stays on the device and in the dtype"):
        frozen.double()
    with pytest.raises(RuntimeError, match=r"use sparsekd\.load_frozen"):
        frozen.load_state_dict({})


class Enlarging(nn.Module):
    """What float32 rounds off in the convolution, folded or not, is enlarged by as much as `times`."""

    def __init__(self, times):
        super().__init__()
        self.conv, self.bn, self.times = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), times

    def forward(self, x):
        return torch.sin(self.times * self.bn(self.conv(x)))


def test_a_network_that_enlarges_rounding_is_held_against_its_answer_in_float64(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(1, 64, 12, 12)
    model = sparsekd.sparsify(trained(Enlarging(300.0)), density=0.5).eval()
    quick(model, x)
    with monkeypatch.context() as patch:
        patch.setattr(network, "_in_float64", lambda *given: None)
        with pytest.raises(RuntimeError, match="differ from the model's by"):
            quick(model, x)
        patch.setattr(network, "_in_float64", lambda frozen, traced, inputs: model(*inputs))  # as if exact
        with pytest.raises(RuntimeError, match="differ from the model's by"):
            quick(model, x)
