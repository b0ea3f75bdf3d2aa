"""What is fused into one call, in every spelling, and what only looks so."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.freeze import export, load_frozen, measure
from sparsekd.freeze.packed import cpu_layer
from sparsekd.freeze.sites import Site, find_sites
from sparsekd.nn import SparseConv2d, SparseLinear

from .networks import (
    IMAGE,
    Custom,
    PreActivation,
    ResNet,
    assert_frozen_equals,
    calls,
    gains,
    needs_kernels,
    quick,
    trained,
)


def test_basic_blocks_become_one_call_per_convolution():
    frozen = quick(trained(ResNet()), torch.randn(IMAGE))
    assert calls(frozen) == ["frozen"] * 8  # the last but one takes the mean
    fused = {layer.name: layer.geometry.fused for layer in frozen.plan}
    assert fused == {
        "stem.0": "bn+relu",
        "blocks.0.conv1": "bn+relu",
        "blocks.0.conv2": "bn+add+relu",
        "blocks.1.conv1": "bn+relu",
        "blocks.1.conv2": "bn+add+relu",  # the larger of the two convolutions that meet in the add
        "blocks.1.shortcut.0": "bn",
        "pool": "",
        "head": "",
    }


def add_to_the_input(m, x):
    return m.conv(m.bn(x)) + x


def add_to_what_is_read_later(m, x):
    y = m.bn(x)
    return m.conv(y) + y, y


def add_to_a_value_with_a_view(m, x):
    y = m.bn(x)
    part = y[:, :4]
    return m.conv(x) + y, part


def add_to_what_was_read_last(m, x):
    y = m.bn(x)
    return m.conv(m.conv(y)) + y


def add_to_its_own_input(m, x):
    y = m.bn(x)
    return m.conv(y) + y


@gains
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("forward", "reuse"),
    [
        (add_to_the_input, False),
        (add_to_what_is_read_later, False),
        (add_to_a_value_with_a_view, False),
        (add_to_its_own_input, False),
        (add_to_what_was_read_last, True),
    ],
)
def test_a_residual_gives_its_memory_only_where_nobody_reads_it_again(forward, reuse, memory_format, min_gain):
    model = trained(Custom(forward)).eval()
    x = torch.randn(2, 16, 5, 5).contiguous(memory_format=getattr(torch, memory_format, torch.contiguous_format))
    frozen = quick(model, x, min_gain=min_gain, memory_format=memory_format)
    assert any("reuse" in node.kwargs for node in frozen.network.graph.nodes) == reuse
    before = x.clone()
    torch.testing.assert_close(frozen(x), model(before), rtol=1e-4, atol=1e-4)
    assert torch.equal(x, before)


def test_preactivation_keeps_the_norm_in_front():
    frozen = quick(trained(PreActivation(16, 16, 1)), torch.randn(1, 16, 6, 6))
    assert calls(frozen) == ["frozen"] * 4
    assert [layer.geometry.kind for layer in frozen.plan] == ["norm", "conv2d", "conv2d", "conv2d"]
    assert [layer.geometry.fused for layer in frozen.plan] == ["relu", "", "bn+relu", "add"]


ACTIVATIONS = {
    "F.relu": F.relu,
    "F.relu in place": lambda y: F.relu(y, inplace=True),
    "F.relu in place by position": lambda y: F.relu(y, True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda y: y.relu(),
    "method in place": lambda y: y.relu_(),
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "F.relu6": F.relu6,
    "module ReLU6 in place": nn.ReLU6(inplace=True),
    "module Hardtanh": nn.Hardtanh(0.0, 6.0),
    "F.hardtanh_": lambda y: F.hardtanh_(y, 0, max_val=6),
    "method clamp": lambda y: y.clamp(0, 6),
    "torch.clamp_": lambda y: torch.clamp_(y, min=0, max=6),
    "F.silu": F.silu,
    "module SiLU in place": nn.SiLU(inplace=True),
    "F.hardswish": F.hardswish,
    "module Hardsigmoid in place": nn.Hardsigmoid(inplace=True),
    "method sigmoid": lambda y: y.sigmoid(),
    "F.gelu": F.gelu,
    "module GELU of tanh": nn.GELU("tanh"),
}
ADDS = {
    "+": lambda y, x: y + x,
    "swapped": lambda y, x: x + y,
    "+=": operator.iadd,
    "torch.add": torch.add,
    "method": lambda y, x: y.add(x),
    "method in place": lambda y, x: y.add_(x),
}


def residual(model: Custom, x, relu, add):
    return relu(add(model.bn(model.conv(x)), x))


@gains
@pytest.mark.parametrize(("relu", "add"), [*((relu, "+") for relu in ACTIVATIONS), *(("F.relu", add) for add in ADDS)])
def test_every_spelling_is_fused(relu, add, min_gain):
    model = Custom(lambda m, x: residual(m, x, m.relu if "module" in relu else ACTIVATIONS[relu], ADDS[add]))
    model.relu = ACTIVATIONS[relu]
    trained(model)
    nn.init.constant_(model.bn.weight, 5.0)  # so that values beyond 6 exist
    x = torch.randn(2, 16, 5, 5)
    frozen = quick(model, x, min_gain=min_gain, memory_format="channels_last" if "module" in relu else "contiguous")
    assert calls(frozen) == ["frozen"]
    assert_frozen_equals(model, frozen, x)


def read_twice(m, x):
    y = m.conv(x)
    return m.bn(y) + y


def change_the_input_after_use(m, x):
    seen = x * 1
    y = m.conv(seen)
    seen.mul_(3)
    return y + seen


def change_the_residual_and_use_it(m, x):
    kept = x * 1
    kept += m.conv(x)
    return kept, kept * 2


def change_the_residual_in_place(m, x):
    kept = x * 1
    kept.add_(m.conv(x))
    return kept * 3


def relu_without_its_result(m, x):
    y = m.bn(m.conv(x))
    torch.relu_(y)
    return y


def scaled_add(m, x):
    return torch.add(m.conv(x), x, alpha=2)


def add_a_number(m, x):
    return m.conv(x) + 1.5


def broadcast_add(m, x):
    return m.conv(x) + x.mean((2, 3), keepdim=True)


def add_something_larger(m, x):
    return m.conv(x.mean((2, 3), keepdim=True)) + x


def add_itself(m, x):
    y = m.conv(x)
    return y + y


def relu_before_add(m, x):
    return torch.relu(m.conv(x)) + x


def another_clamp(m, x):
    return m.conv(x).clamp(0, 0.5) + F.hardtanh(m.bn(x))


def two_convolutions_one_layer(m, x):
    return m.conv(torch.relu(m.bn(m.conv(x))))


@gains
@pytest.mark.parametrize(
    "forward",
    [
        read_twice,
        change_the_input_after_use,
        change_the_residual_and_use_it,
        change_the_residual_in_place,
        relu_without_its_result,
        scaled_add,
        add_a_number,
        broadcast_add,
        add_something_larger,
        add_itself,
        relu_before_add,
        another_clamp,
        two_convolutions_one_layer,
    ],
)
def test_what_looks_fusable_but_is_not(forward, min_gain):
    model = trained(Custom(forward)).eval()
    frozen = quick(model, torch.randn(2, 16, 5, 5), min_gain=min_gain)
    x = torch.randn(3, 16, 5, 5)
    torch.testing.assert_close(frozen(x.clone()), model(x.clone()), rtol=1e-4, atol=1e-4)


def test_a_norm_of_the_batch_is_not_folded():
    model = Custom(lambda m, x: m.bn(m.conv(x)))
    model.bn = nn.BatchNorm2d(16, track_running_stats=False)
    x = torch.randn(4, 16, 5, 5)
    frozen = quick(model, x)
    assert calls(frozen) == ["frozen", "BatchNorm2d"]
    assert_frozen_equals(model, frozen, x)


def test_a_layer_whose_bias_is_read_elsewhere_is_folded_and_the_reader_keeps_its_number(tmp_path):
    def build():
        return Custom(lambda m, x: m.bn(m.conv(x)) * m.conv.bias.view(1, -1, 1, 1))

    model = trained(build())
    x = torch.randn(2, 16, 5, 5)
    frozen = quick(model, x)
    assert frozen.plan["conv"].geometry.batch_norm
    assert not {"BatchNorm2d", "view"} & set(calls(frozen))
    assert_frozen_equals(model, frozen, x)
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", model)(x), frozen(x))


@gains
def test_a_residual_that_broadcasts_over_the_batch(min_gain):
    model = Custom(lambda m, x: m.conv(x) + m.map)
    model.map = nn.Parameter(torch.randn(1, 16, 5, 5))
    frozen = quick(model, torch.randn(1, 16, 5, 5), min_gain=min_gain)  # at batch 1 the shapes are equal
    assert calls(frozen) == ["frozen"]
    assert_frozen_equals(model, frozen, torch.randn(3, 16, 5, 5))


@gains
def test_one_layer_under_two_norms_is_folded_twice(min_gain):
    model = Custom(lambda m, x: m.other(m.conv(m.bn(m.conv(x)))))
    model.other = nn.BatchNorm2d(16)
    trained(model)
    frozen = quick(model, torch.randn(2, 16, 5, 5), min_gain=min_gain)
    assert [layer.name for layer in frozen.plan] == ["conv", "conv@2"]
    assert_frozen_equals(model, frozen, torch.randn(2, 16, 5, 5))


CONVS = [
    {"stride": 2},
    {"stride": (2, 1), "padding": (1, 0), "bias": False},
    {"padding": "same", "kernel_size": (4, 2)},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"kernel_size": 1},
]


@gains
@pytest.mark.parametrize("arguments", CONVS, ids=str)
def test_every_geometry(arguments, min_gain):
    arguments = {"kernel_size": 3, **arguments}
    conv = SparseConv2d(14, 32, **arguments, density=0.4)
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(32, 14, **{**arguments, "stride": 1}))
    frozen = quick(model, torch.randn(1, 14, 9, 10), min_gain=min_gain)
    assert_frozen_equals(model, frozen, torch.randn(2, 14, 9, 10))


@gains
@pytest.mark.parametrize("shape", [(20,), (4, 20), (2, 3, 20)], ids=str)
def test_linear_layers_take_any_number_of_dimensions(shape, min_gain):
    model = nn.Sequential(SparseLinear(20, 33, density=0.4), nn.ReLU(), SparseLinear(33, 5, density=0.4))
    x = torch.randn(shape)
    assert_frozen_equals(model, quick(model, x, min_gain=min_gain), x)


@gains
def test_a_bare_layer(min_gain):
    layer = SparseConv2d(3, 16, 3, density=0.5)
    assert_frozen_equals(layer, quick(layer, torch.randn(1, 3, 5, 5), min_gain=min_gain), torch.randn(2, 3, 5, 5))


DEPTHWISE = [
    (nn.Conv2d(16, 16, 3, padding=1, groups=16), 9, 12),
    (nn.Conv2d(37, 37, 3, 2, 1, groups=37, bias=False), 8, 23),
    (nn.Conv2d(5, 5, (2, 5), (1, 2), (0, 3), (2, 1), groups=5), 7, 6),
    (nn.Conv2d(48, 48, 5, padding=4, dilation=2, groups=48), 2, 3),
    (nn.BatchNorm2d(21), 5, 7),
    (nn.Conv2d(7, 37, 3, padding=1), 6, 6),
    (nn.Linear(20, 33), None, None),
]


@needs_kernels
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu6", "silu", "hardswish", "gelu"])
@pytest.mark.parametrize(("layer", "h", "w"), DEPTHWISE, ids=str)
def test_native_kernels_compute_what_torch_does(layer, h, w, activation, residual):
    layer = trained(nn.Sequential(layer))[0].eval()
    conv = isinstance(layer, nn.Conv2d)
    x = (
        torch.randn(3, 20)
        if h is None
        else torch.randn(3, layer.weight.shape[0 if layer.weight.dim() == 1 else 1], h, w)
    )
    if conv and layer.groups > 1:
        x = torch.randn(3, layer.in_channels, h, w)
    site = Site("layer", "layer", tuple(x.shape), add="add" if residual and h and conv else None, activation=activation)
    geometry = measure.geometry_of(site, layer)
    weight, bias = measure.fold(site, layer, None)
    want = layer(x)
    add = torch.randn_like(want) if geometry.residual else None
    for layout in ["contiguous", "channels_last"]:
        if measure.why_dense(geometry, weight, layout):
            assert layout == "contiguous" and geometry.depthwise
            continue
        for chosen in ("dense", "native"):
            frozen = cpu_layer(geometry, weight, bias, chosen=chosen, memory_format=layout, threads=2)
            got = frozen(x, None if add is None else add.clone())
            summed = want.double() if add is None else want.double() + add
            expected = export.ACTIVATIONS[activation](summed)
            torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)


def stochastic_depth(input, p, mode, training=True):
    """As torchvision has it: a function that torch.fx records as one call."""
    return input if not training else input * torch.bernoulli(torch.full_like(input[:, :1], 1 - p))


torch.fx.wrap("stochastic_depth")


def test_a_residual_behind_stochastic_depth_is_fused():
    model = Custom(lambda m, x: F.relu(stochastic_depth(m.bn(m.conv(x)), 0.2, "row", m.training) + x)).eval()
    x = torch.randn(2, 16, 5, 5)
    frozen = quick(model, x)
    assert [layer.geometry.fused for layer in frozen.plan] == ["bn+add+relu"]
    assert_frozen_equals(model, frozen, x)


def test_on_a_gpu_only_what_its_kernels_know_is_fused():
    layers = (
        nn.Conv2d(16, 16, 1),
        nn.GELU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 2),
        nn.MaxPool2d(2),
    )
    network = torch.fx.symbolic_trace(nn.Sequential(*layers).eval())
    x = torch.randn(1, 16, 4, 4)
    assert [(one.name, one.activation) for one in find_sites(network, (x,), pools=False)] == [
        ("0", "none"),
        ("2", "relu"),
    ]
    found = [(one.name, one.activation) for one in find_sites(network, (x,))]
    assert found == [("0", "gelu"), ("2", "relu"), ("4", "none"), ("5", "none")]
