"""freeze: exact folding, real fusion, honest choices, outputs of the model, files without pickle."""

import copy
import json
import operator
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import sparsekd
from sparsekd import BlockPattern, checkpoint
from sparsekd.backends import cpu
from sparsekd.freeze import FrozenModel, Plan, freeze, load_frozen, measure
from sparsekd.freeze.layer import FrozenLayer
from sparsekd.freeze.sites import Site
from sparsekd.models import FeatureCNN, RatingCNN, Shape
from sparsekd.nn import SparseConv2d, SparseLinear

from ..cases import torch_threads
from .networks import (
    ALL_DENSE,
    ALL_SPARSE,
    IMAGE,
    MODELS,
    Custom,
    PreActivation,
    ResNet,
    assert_frozen_equals,
    quick,
    trained,
    wrong_in_threads,
)

needs_kernels = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
gains = pytest.mark.parametrize(
    "min_gain", [pytest.param(ALL_SPARSE, id="sparse", marks=needs_kernels), pytest.param(ALL_DENSE, id="dense")]
)


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def calls(frozen: FrozenModel) -> list[str]:
    """What the frozen graph does, in order: "frozen", or the name of the module class, function or method."""
    kinds = []
    for node in frozen.network.graph.nodes:
        if node.op == "call_module":
            module = frozen.network.get_submodule(node.target)
            kinds.append("frozen" if isinstance(module, FrozenLayer) else type(module).__name__)
        elif node.op in ("call_function", "call_method"):
            kinds.append(getattr(node.target, "__name__", node.target))
    return kinds


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


# ---- Folding


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("pattern", [None, BlockPattern(16, 1), BlockPattern(5, 3)], ids=str)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_folding_is_exact(kind, pattern, affine, bias):
    layer = nn.Conv2d(7, 37, 3, bias=bias).double() if kind == "conv" else nn.Linear(7, 37, bias=bias).double()
    norm = trained((nn.BatchNorm2d if kind == "conv" else nn.BatchNorm1d)(37, affine=affine)).double().eval()
    x = torch.randn(4, 7, 6, 6).double() if kind == "conv" else torch.randn(4, 7).double()
    if pattern:
        layer = (SparseConv2d if kind == "conv" else SparseLinear).from_dense(layer, pattern, density=0.4)
    weight, folded_bias = measure.fold(Site("layer", "layer", ()), layer, norm)
    dense = weight.to_dense() if pattern else weight
    got = F.conv2d(x, dense, folded_bias) if kind == "conv" else F.linear(x, dense, folded_bias)
    torch.testing.assert_close(got, norm(layer(x)), rtol=1e-12, atol=1e-12)
    if pattern:
        weight.validate()
        assert torch.equal(weight.mask(), layer.block_mask())


def test_float64_networks_stay_exact_and_dense():
    model = sparsekd.sparsify(trained(ResNet()).double(), density=0.4).eval()
    x = torch.randn(IMAGE).double()
    frozen = quick(model, x)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-12, atol=1e-12)
    if cpu.native is not None:
        assert frozen.plan["head"].why == "kernels take float32 and bfloat16, the layer is float64"


@needs_kernels
def test_bfloat16_networks_run_on_the_kernels_of_bfloat16():
    model = sparsekd.sparsify(trained(ResNet()), BlockPattern(16, 2), density=0.4, exclude=["stem.*"]).eval()
    x = torch.randn(IMAGE)
    frozen = quick(copy.deepcopy(model).bfloat16(), x.bfloat16())
    assert {layer.chosen for layer in frozen.plan if layer.pattern} == {"sparse"}
    got, want = frozen(x.bfloat16()), model(x)
    assert got.dtype == torch.bfloat16 and (got - want).abs().max() < 0.05 * want.abs().max()
    with pytest.raises(TypeError, match=r"expected bfloat16 \[N, 16, 12, 12\] on the CPU, got torch.float32"):
        frozen.network.get_submodule("blocks.0.conv1")(torch.randn(1, 16, 12, 12))


@needs_kernels
def test_bf16_inside_float32_outside(tmp_path):
    model = sparsekd.sparsify(trained(ResNet()), BlockPattern(16, 2), density=0.4).eval()
    frozen = quick(model, torch.randn(IMAGE), dtype="bf16")
    assert {layer.chosen for layer in frozen.plan if layer.pattern} == {"sparse"}
    x = torch.randn(3, *IMAGE[1:])
    frozen.save(tmp_path / "frozen")
    loaded = load_frozen(tmp_path / "frozen", model)
    with torch.no_grad():
        want, cast = model(x), copy.deepcopy(model).bfloat16()(x.bfloat16())
    for network in (frozen, loaded):
        got = network(x)
        assert got.dtype == torch.float32 and torch.equal(got, got.bfloat16().float())  # bf16 inside
        assert (got - want).abs().max() <= max(2 * (cast - want).abs().max(), 0.02 * want.abs().max())
    with pytest.raises(TypeError, match=r"expected a torch\.float32 tensor"):
        frozen(x.bfloat16())
    assert model.head.values.dtype == torch.float32  # left as it was
    with pytest.raises(TypeError, match="casts a float32 model"):
        quick(copy.deepcopy(model).bfloat16(), x.bfloat16(), dtype="bf16")
    with pytest.raises(RuntimeError, match="differ from the model's"):
        quick(model, x, dtype="bf16", tolerance=1e-5)


@gains
def test_dead_filters_give_relu_of_their_bias(min_gain):
    conv = nn.Conv2d(8, 48, 3, padding=1)
    mask = torch.ones(BlockPattern().grid(conv.weight.shape), dtype=torch.bool)
    mask[1] = False
    model = trained(nn.Sequential(SparseConv2d.from_dense(conv, mask=mask), nn.BatchNorm2d(48), nn.ReLU()))
    frozen = quick(model, torch.randn(1, 8, 5, 5), min_gain=min_gain)
    y = frozen(torch.randn(2, 8, 5, 5))[:, 16:32]
    bias = next(module for module in frozen.modules() if isinstance(module, FrozenLayer)).bias[16:32]
    assert torch.equal(y, bias.relu().view(1, 16, 1, 1).expand_as(y))
    assert bias.abs().min() > 0


# ---- Fusion


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


def test_a_layer_whose_weight_is_read_elsewhere_is_left_alone(tmp_path):
    def build():
        return Custom(lambda m, x: m.bn(m.conv(x)) * m.conv.bias.view(1, -1, 1, 1))

    model = trained(build())
    x = torch.randn(2, 16, 5, 5)
    frozen = quick(model, x)
    assert ([layer.name for layer in frozen.plan], frozen.plan.notes[-1].rsplit(" ", 1)[1]) == (["bn"], "conv")
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
@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
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
            frozen = FrozenLayer(geometry, weight, bias, chosen=chosen, memory_format=layout, threads=2)
            got = frozen(x, None if add is None else add.clone())
            summed = want.double() if add is None else want.double() + add
            expected = {"none": summed, "relu6": F.relu6(summed), "silu": F.silu(summed)}[activation]
            torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)


# ---- The plan


@needs_kernels
def test_plan_says_what_was_measured_and_why():
    model = sparsekd.sparsify(trained(ResNet()), density=0.4, exclude=["stem.*"])
    frozen = freeze(model, torch.randn(IMAGE), layer_ms=5)
    plan = frozen.plan
    assert [layer.name for layer in plan][:2] == ["stem.0", "blocks.0.conv1"]
    stem, conv = plan["stem.0"], plan["blocks.1.conv1"]
    assert stem.pattern is None and stem.chosen in ("dense", "native") and stem.why.startswith("native is ")
    assert (conv.geometry.input, conv.geometry.weight, conv.pattern) == ((2, 16, 12, 12), (32, 16, 3, 3), "16x1")
    assert conv.density == pytest.approx(model.blocks[1].conv1.density)
    for layer in plan:
        assert layer.dense_us > 0
        if layer.chosen != "dense" and "neighbours" not in layer.why:
            assert layer.sparse_us < layer.dense_us
            assert "x as fast" in layer.why
    assert {"unfrozen", "contiguous", "channels_last"} <= set(plan.network_us)
    us = {name: us for name, us in plan.network_us.items() if not name.startswith(("unfrozen", "slices"))}
    assert plan.memory_format == min(us, key=us.__getitem__).split(",")[0]
    table = str(plan).splitlines()
    assert " ".join(table[0].split()) == "layer input weight fused density dense us sparse us chosen why"
    assert "32x16x3x3 /2" in table[4]
    assert len(table) == 1 + len(plan) + 1


def test_plan_survives_json():
    plan = quick(sparsekd.sparsify(ResNet(), density=0.4), torch.randn(IMAGE)).plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@needs_kernels
def test_the_slower_kernel_is_not_chosen(monkeypatch):
    """Sparse that takes as long as dense, give or take, is noise: dense stays."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks) * 1e-3)  # every sample takes 1 ms
    model = nn.Sequential(SparseConv2d(16, 16, 3, density=0.1))
    assert freeze(model, torch.randn(1, 16, 8, 8), layer_ms=1).plan["0"].chosen == "dense"


def test_threads_are_set_back():
    torch.set_num_threads(2)
    frozen = quick(ResNet(), torch.randn(IMAGE), threads=1)
    assert (frozen.plan.threads, torch.get_num_threads()) == (1, 2)
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        freeze(ResNet(), torch.randn(IMAGE), threads=0)


def test_a_model_with_nothing_to_choose_says_so():
    model = trained(ResNet())
    frozen = quick(model, torch.randn(IMAGE))
    assert "sparse" not in {layer.chosen for layer in frozen.plan}
    assert "no block-sparse layer" in str(frozen.plan)
    assert_frozen_equals(model, frozen, torch.randn(IMAGE))


@pytest.fixture
def take_kernels_away(monkeypatch):
    """A function after which freeze sees a machine without the compiled module."""
    gone = SimpleNamespace(native=None, missing="sparsekd._C is not there")

    def take() -> None:
        for name in ("sparsekd.freeze", "sparsekd.freeze.measure", "sparsekd.freeze.layer"):
            monkeypatch.setattr(sys.modules[name], "cpu", gone)

    return take


def test_without_the_compiled_module_everything_is_dense(take_kernels_away):
    model = sparsekd.sparsify(trained(ResNet()), density=0.4)
    take_kernels_away()
    frozen = quick(model, torch.randn(IMAGE))
    assert {layer.chosen for layer in frozen.plan} == {"dense"}
    assert frozen.plan["blocks.0.conv1"].why == "sparsekd._C is not there"
    assert "every layer stays dense: sparsekd._C is not there" in frozen.plan.notes
    assert_frozen_equals(model, frozen, torch.randn(IMAGE))


# ---- Models that are hard to trace


class Branching(nn.Module):
    """Its path depends on the data: torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else self.conv(x)


@gains
def test_a_model_that_cannot_be_traced_is_frozen_layer_by_layer(min_gain, tmp_path):
    model = sparsekd.sparsify(trained(Branching()), density=0.5)
    x = torch.rand(IMAGE)
    frozen = quick(model, x, min_gain=min_gain)
    assert "torch.fx cannot trace the model (TraceError: symbolically traced" in frozen.plan.notes[0]
    assert "one by one, nothing is fused" in frozen.plan.notes[0]
    assert frozen.plan["conv"].chosen == ("sparse" if min_gain == ALL_SPARSE else "dense")
    for sign in (1, -1):
        assert_frozen_equals(model, frozen, sign * x)
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", Branching())(x), frozen(x))


def test_a_trace_that_computes_something_else_is_not_used():
    def change_a_view(m, x):
        base = x * 1
        part = base[:, :8]
        part += m.conv(x)[:, :8]  # torch.fx records part = part + ..., which leaves base as it was
        return base

    model = Custom(change_a_view)
    x = torch.randn(2, 16, 5, 5)
    frozen = quick(model, x)
    assert "torch.fx traces of the model computes something else: layers were chosen one by one" in frozen.plan.notes[0]
    assert_frozen_equals(model, frozen, x)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x, mask=None, scale: float = 2.0, relu: bool = True):
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        return {"y": (y.relu() if relu else y) * scale, "size": y.shape[0]}


def test_arguments_left_at_their_default():
    model = Optional()
    x = torch.randn(IMAGE)
    frozen = quick(model, x)
    assert not frozen.plan.notes[0].startswith("torch.fx")
    got, want = frozen(x), model(x)
    torch.testing.assert_close(got["y"], want["y"], rtol=1e-4, atol=1e-4)
    assert got["size"] == 2
    mask = torch.rand(2, 16, 10, 10)
    torch.testing.assert_close(quick(model, (x, mask))(x, mask)["y"], model(x, mask)["y"], rtol=1e-4, atol=1e-4)


def test_layers_without_a_batch_dimension_are_left_alone():
    model = nn.Sequential(SparseConv2d(3, 16, 3, density=0.5), nn.ReLU())
    x = torch.randn(3, 6, 6)
    frozen = quick(model, x)
    assert len(frozen.plan) == 0
    assert frozen.plan.notes[-1].endswith(": 0")
    assert_frozen_equals(model, frozen, x)


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
    with pytest.raises(ValueError, match=r"expected an input of shape \[N, 3, 12, 12\], got \(2, 3, 12, 13\); freeze"):
        frozen(torch.randn(2, 3, 12, 13))
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
        layer(torch.randn(2, 16, 4, 3))
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


# ---- Files


class Allocations(TorchFunctionMode):
    """Notes the device that each torch.empty asks for."""

    def __init__(self):
        super().__init__()
        self.devices = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "empty":
            self.devices.append((kwargs or {}).get("device"))
        return func(*args, **(kwargs or {}))


@needs_kernels
def test_kernels_write_to_the_cpu_whatever_the_default_device():
    """Under `torch.device("meta")` an output without a device has address 0."""
    model, x = (
        nn.Sequential(SparseConv2d(3, 16, 3), nn.Flatten(), SparseLinear(16 * 36, 4)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    frozen = quick(model, x)
    with Allocations() as seen:
        frozen(x)
    assert seen.devices == ["cpu", "cpu"]


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 8, 6, 6))
        self.of_place, self.of_image = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.of_place(self.place) + self.of_image(x)


def test_a_layer_of_a_parameter_is_not_fused_with_one_of_the_batch():
    model, x = Embedded().eval(), torch.randn(3, 8, 6, 6)
    frozen = quick(model, x[:1])  # where both have a batch of 1
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 64, 10)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = x.view(x.size(0), -1)
        return self.linear(x) + x.sum(1, keepdim=True)


@pytest.mark.parametrize("memory_format", [None, "contiguous", "channels_last"])
def test_a_view_of_a_map_works_in_any_memory_format(memory_format):
    model, x = Viewed().eval(), torch.randn(2, 3, 8, 8)
    frozen = freeze(model, x, layer_ms=1.0, memory_format=memory_format)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


@gains
@pytest.mark.parametrize("fresh", ["dense", "sparse"])
def test_save_and_load(fresh, min_gain, tmp_path):
    model = sparsekd.sparsify(trained(ResNet()), BlockPattern(8, 2), density=0.3)
    x = torch.randn(IMAGE)
    frozen = quick(model, x, min_gain=min_gain)
    frozen.save(tmp_path / "student.frozen")
    structure = ResNet() if fresh == "dense" else sparsekd.sparsify(ResNet(), density=0.9)
    loaded = load_frozen(tmp_path / "student.frozen", structure)
    assert loaded.plan == frozen.plan
    assert torch.equal(loaded(x), frozen(x))
    assert [path.name for path in tmp_path.iterdir()] == ["student.frozen"]
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "student.frozen").read_bytes()


@gains
def test_a_file_holds_blocks_whatever_was_chosen(min_gain, tmp_path):
    model = nn.Sequential(SparseConv2d(64, 64, 3, density=0.1), nn.ReLU())
    quick(model, torch.randn(1, 64, 5, 5), min_gain=min_gain).save(tmp_path / "frozen")
    assert (tmp_path / "frozen").stat().st_size < 0.25 * 64 * 64 * 9 * 4


def test_what_is_not_frozen_is_in_the_file_too(tmp_path):
    model = trained(nn.Sequential(PreActivation(16, 16, 1), nn.PReLU(16), nn.ConvTranspose2d(16, 4, 2)))
    x = torch.randn(1, 16, 6, 6)
    frozen = quick(model, x)
    frozen.save(tmp_path / "frozen")
    fresh = nn.Sequential(PreActivation(16, 16, 1), nn.PReLU(16), nn.ConvTranspose2d(16, 4, 2))
    before = copy.deepcopy(fresh.state_dict())
    assert torch.equal(load_frozen(tmp_path / "frozen", fresh)(x), frozen(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_files_of_other_models_are_refused(tmp_path):
    quick(ResNet(), torch.randn(IMAGE)).save(tmp_path / "frozen")
    with pytest.raises(ValueError, match=r"another model: tensor stem\.0\.weight is \[16, 3, 3, 3\] in the file"):
        load_frozen(tmp_path / "frozen", ResNet(32))
    reordered = ResNet()
    reordered.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.ReLU())
    with pytest.raises(ValueError, match="belongs to another model: traced nodes"):
        load_frozen(tmp_path / "frozen", reordered)
    strided = ResNet()
    strided.stem[0].stride = (2, 2)
    with pytest.raises(ValueError, match=r"belongs to another model: layer stem\.0 is .*'stride': \(1, 1\)"):
        load_frozen(tmp_path / "frozen", strided)
    state = checkpoint.load_state(tmp_path / "frozen")
    state["layers"]["stem.0"]["bias"] = torch.zeros(3)
    checkpoint.save_state(state, tmp_path / "other")
    with pytest.raises(ValueError, match=r"the tensors of stem\.0 do not fit 16x3x3x3"):
        load_frozen(tmp_path / "other", ResNet())
    checkpoint.save_state({"kind": "other"}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no frozen network"):
        load_frozen(tmp_path / "other", ResNet())
    (tmp_path / "cut").write_bytes((tmp_path / "frozen").read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt or cut short"):
        load_frozen(tmp_path / "cut", ResNet())
    with pytest.raises(FileNotFoundError):
        load_frozen(tmp_path / "missing", ResNet())


@needs_kernels
def test_a_sparse_file_loads_without_the_compiled_module(tmp_path, take_kernels_away):
    model = sparsekd.sparsify(trained(ResNet()), density=0.3)
    x = torch.randn(IMAGE)
    frozen = quick(model, x)
    frozen.save(tmp_path / "frozen")
    take_kernels_away()
    loaded = load_frozen(tmp_path / "frozen", ResNet())
    assert {layer.chosen for layer in loaded.plan} == {"dense"}
    assert "here is sparsekd._C is not there; freeze again on this machine" in loaded.plan.notes[-1]
    torch.testing.assert_close(loaded(x), frozen(x), rtol=1e-4, atol=1e-4)
