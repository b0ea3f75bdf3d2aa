"""Budgets in microseconds: a table of costs, what it predicts, and what is pruned by it."""

import copy
import json
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekd
from sparsekd import BlockPattern
from sparsekd.backends import cpu
from sparsekd.pruning import CostTable, LayerCost, Pruner, count_macs
from sparsekd.pruning import cost as cost_module
from sparsekd.pruning.choice import Rule
from sparsekd.pruning.cost import Timed, _in_the_network, network_of
from sparsekd.pruning.pruner import COST_FLOOR
from sparsekd.pruning.units import prunable_layers

from .common import IMAGE, Net, pruner_of, student


def cost(dense_us, *pairs, pattern="4x1"):
    return LayerCost(pattern, dense_us, tuple(d for d, _ in pairs), tuple(us for _, us in pairs))


def test_time_between_and_beyond_what_was_measured():
    layer = cost(10.0, (0.1, 2.0), (0.3, 4.0), (0.5, 8.0))
    assert [layer.us(d) for d in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)] == pytest.approx([2, 2, 2, 3, 4, 6, 8])
    assert [layer.us(d) for d in (0.55, 0.6, 0.8, 1.0)] == pytest.approx([9, 10, 10, 10])  # never more than dense
    assert cost(10.0, (0.1, 3.0), (0.5, 2.0)).us(0.5) == 3.0  # noise: time does not fall with density
    assert cost(10.0, (0.5, 2.0)).us(1.0) == 10.0


@given(
    st.floats(0.1, 50),
    st.lists(
        st.tuples(st.floats(0.01, 0.99), st.floats(0, 50)), min_size=1, max_size=5, unique_by=lambda pair: pair[0]
    ),
    st.floats(0, 0.5),
)
@settings(deadline=None)
def test_the_convex_function_below_the_time(dense_us, pairs, least):
    layer = cost(dense_us, *sorted(pairs))
    grid = [least + (1 - least) * i / 40 for i in range(41)]
    times = [layer.us(d) for d in grid]
    assert all(after >= before - 1e-9 for before, after in pairwise(times))
    assert max(times) <= dense_us + 1e-9 and times[-1] == pytest.approx(dense_us)
    slopes = layer.slopes(least)
    assert all(steeper >= slope - 1e-6 * max(1.0, abs(slope)) for (_, slope), (_, steeper) in pairwise(slopes))
    below, at = layer.us(least), least
    for density, us in zip(grid, times, strict=True):
        while slopes and density > slopes[0][0] + 1e-12:
            end, slope = slopes.pop(0)
            below, at = below + slope * (end - at), end
        assert below + (slopes[0][1] * (density - at) if slopes else 0) <= us + 1e-6


def table_of(model, layers, rest_us=5.0, **fields):
    isa = cpu.native.isa() if cpu.native else "none"
    common = {"machine": "a machine", "isa": isa, "threads": 2, "batch": 2, "inputs": ((2, 2, 6, 6),)}
    common |= {"dtype": "float32", "weights": "float32", "network": network_of(model), "rest_us": rest_us}
    return CostTable(**{**common, "layers": layers, **fields})


def costs_of_net(net, **fields):
    """conv1 hardly gains, conv2 does, and the head is never faster than dense."""
    layers = {
        "conv1": cost(20.0, (0.1, 8.0), (0.5, 30.0)),
        "conv2": cost(60.0, (0.1, 6.0), (0.5, 30.0)),
        "head": cost(3.0, (0.1, 4.0), (0.5, 5.0)),
    }
    return table_of(net, layers, **fields)


@pytest.mark.parametrize("scope", ["cost", "global", "layer"])
@pytest.mark.parametrize("target", [70.0, 40.0, 25.0, 0.5])
def test_a_latency_is_met(scope, target):
    net = Net()
    costs = costs_of_net(net)
    pruner = pruner_of(net, pattern=BlockPattern(4, 1), scope=scope, costs=costs)
    assert pruner.predicted_us == (88.0, 88.0)
    pruner.prune_to(latency_us=target)
    wanted = 44.0 if target == 0.5 else target
    assert pruner.predicted_us[1] == pytest.approx(wanted, abs=0.6)
    assert costs.predict(net) == pruner.predicted_us[1] and f"{pruner.predicted_us[1]:.0f} of 88 us" in str(pruner)
    by_hand = 5.0 + sum(costs.layers[name].us(net.get_submodule(name).density) for name in costs.layers)
    assert by_hand == pytest.approx(pruner.predicted_us[1])
    if scope == "cost":
        assert net.head.density == 1.0  # it would not become faster
        for name in ("conv1", "conv2"):  # dense, or where the time has fallen
            layer = net.get_submodule(name)
            assert layer.density == 1.0 or costs.layers[name].us(layer.density) < costs.layers[name].dense_us
    pruner.grow_to(latency_us=80.0)
    assert pruner.predicted_us[1] == pytest.approx(80.0, abs=0.6)
    pruner.check()


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_allocation_by_time_is_as_good_as_any_that_was_tried(data):
    """Among allocations of whole layers to densities that meet the time, none found by search keeps more energy than
    what was chosen, but for the last step of one layer."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    scale = data.draw(st.floats(0.2, 5.0))
    with torch.no_grad():
        net[1].weight *= scale
    layers = {
        "0": cost(20.0, (0.1, 2.0), (0.9, 18.0), pattern="1x1"),
        "1": cost(10.0, (0.1, 1.0), (0.9, 9.0), pattern="1x1"),
    }
    weights = [layer.weight.detach().double().square().flatten().sort(descending=True)[0] for layer in net]
    pruner = Pruner(
        net,
        pattern=BlockPattern(1, 1),
        scope="cost",
        score="magnitude",
        floor=0.0,
        costs=table_of(net, layers, inputs=((1, 16),)),
    )
    target = data.draw(st.floats(10.0, 30.0))
    pruner.prune_to(latency_us=target)
    assert pruner.predicted_us[1] == pytest.approx(target, abs=0.2)
    chosen = sum(float(w[: layer.num_kept].sum()) for w, layer in zip(weights, net, strict=True))
    best = 0.0
    for count in range(1, 257):
        left = target - 5.0 - layers["0"].us(count / 256)
        other = max((n for n in range(1, 257) if layers["1"].us(n / 256) <= left), default=0)
        if other:
            best = max(best, float(weights[0][:count].sum() + weights[1][:other].sum()))
    assert chosen >= best - 2 * float(max(w[0] for w in weights))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (
            4.0,
            r"latency_us=4 cannot be reached: one unit of each layer stays, and 0.02 of its weights, so that",
        ),
        (0.99, r"latency_us=0.99 cannot be reached"),
    ],
)
def test_a_latency_below_what_stays_names_the_smallest(target, says):
    net = Net()
    pruner = pruner_of(net, pattern=BlockPattern(4, 1), scope="cost", costs=costs_of_net(net))
    with pytest.raises(ValueError, match=says) as error:
        pruner.prune_to(latency_us=target)
    assert "the largest part of what stays is 'conv1'" in str(error.value)
    smallest = float(str(error.value).partition("so that ")[2].partition("=")[2].split()[0])
    pruner.prune_to(latency_us=smallest)
    assert pruner.predicted_us[1] == pytest.approx(5 + 8 + 6 + 3, abs=0.1)


def test_costs_of_something_else_are_refused():
    net = Net()
    with pytest.raises(ValueError, match=r"costs of this network \(\w+\), got a table of another \(\w+\)"):
        pruner_of(net, costs=costs_of_net(Net(12)))
    with pytest.raises(ValueError, match=r"costs of this dtype \(float32\), got a table of another \(bfloat16\)"):
        pruner_of(Net(), costs=costs_of_net(net, weights="bfloat16"))
    with pytest.raises(ValueError, match="layer 'conv1' has blocks of 16x1, got the costs of 4x1"):
        pruner_of(Net(), pattern=BlockPattern(16, 1), costs=costs_of_net(net))
    costs = costs_of_net(net)
    some = table_of(net, {name: costs.layers[name] for name in ("conv1", "conv2")})
    with pytest.raises(ValueError, match=r"layer 'head' has no times.*exclude=\['head'\]"):
        pruner_of(Net(), pattern=BlockPattern(4, 1), costs=some)
    pruner_of(Net(), pattern=BlockPattern(4, 1), exclude=["head"], costs=some)


def test_a_table_is_kept_as_json(tmp_path):
    net = Net()
    costs = costs_of_net(net)
    costs.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == costs
    assert json.loads((tmp_path / "costs.json").read_text())["layers"]["head"]["dense_us"] == 3.0
    assert "3 layers, 88 us dense of which 5 are no layers; batch 2, 2 threads, float32" in str(costs)
    other = costs_of_net(net, isa="neon")
    other.save(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"times of neon on a a machine, this machine has .*of_this_machine=False"):
        CostTable.load(tmp_path / "other.json")
    assert CostTable.load(tmp_path / "other.json", of_this_machine=False) == other
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CostTable.load(tmp_path / "none.json")
    for text, says in (("{", "is no JSON"), ("[]", "no table of costs"), ('{"format": "x"}', "no table of costs")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            CostTable.load(tmp_path / "bad.json")


@pytest.mark.parametrize(("rest", "factor"), [(50.0, 0.8), (0.0, 1.2), (10.0, 0.25)])
def test_layers_among_the_others_add_up_to_the_network(rest, factor):
    """A constant and a factor are found; what noise is left at a density goes to the layers of that density."""
    layers = {"a": cost(100.0, (0.1, 20.0), (0.5, 60.0)), "b": cost(40.0, (0.1, 30.0), (0.5, 35.0))}
    alone = {0.1: 50.0, 0.5: 95.0, 1.0: 140.0}
    whole = {density: rest + factor * us for density, us in alone.items()}
    found, among = _in_the_network(layers, whole)
    assert found == pytest.approx(rest, abs=1e-6)
    for name, layer in among.items():
        assert layer.dense_us == pytest.approx(factor * layers[name].dense_us)
        assert layer.sparse_us == pytest.approx([factor * us for us in layers[name].sparse_us])
    whole[0.5] *= 1.04
    found, among = _in_the_network(layers, whole)
    for density, us in whole.items():
        assert found + sum(layer.us(density) for layer in among.values()) == pytest.approx(us)


@pytest.mark.skipif(cpu.native is None, reason="no compiled kernels")
@pytest.mark.parametrize("batch", [1, 16])
def test_a_network_is_measured(batch):
    net = nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 16)
    )
    x = torch.randn(batch, 4, 8, 8)
    costs = CostTable.measure(net, (x,), densities=(0.1, 0.5), layer_ms=1.0)
    assert list(costs.layers) == ["0", "4"] and costs.batch == batch and costs.inputs == ((batch, 4, 8, 8),)
    assert costs.isa == cpu.native.isa() and costs.threads == torch.get_num_threads()
    assert all(layer.dense_us > 0 and layer.pattern == "16x1" for layer in costs.layers.values())
    assert type(net[0]) is nn.Conv2d and net.training  # left as it is
    sparse = sparsekd.sparsify(copy.deepcopy(net), density=0.1)
    assert costs.rest_us < costs.predict(sparse) <= costs.predict(net) == costs.dense_us
    pruner = Pruner(net, scope="cost", floor=0.0, costs=costs, example_inputs=(x,))
    least = costs.rest_us + sum(layer.us(0.0) for layer in costs.layers.values())
    if least < 0.9 * costs.dense_us:  # on a busy machine there may be nothing to gain
        pruner.prune_to(latency_us=(least + costs.dense_us) / 2)


@pytest.mark.skipif(cpu.native is None, reason="no compiled kernels")
@pytest.mark.parametrize("batch", [1, 2])
def test_layers_are_timed_where_the_model_as_it_is_was_faster(monkeypatch, batch):
    """On a busy machine that may be found of any of the networks, and of the slices that a batch of 2 runs in; their
    plans have no layers then."""

    def freeze(model, inputs, **options):
        frozen = cost_module.freeze_of_everyone(model, inputs, **options)
        frozen.plan = replace(frozen.plan, images=int(len(inputs[0]) > 1))
        if "min_gain" not in options:
            frozen.plan = replace(frozen.plan, layers=(), memory_format="contiguous", eager=True)
        return frozen

    monkeypatch.setattr(cost_module, "freeze_of_everyone", cost_module.freeze, raising=False)
    monkeypatch.setattr(cost_module, "freeze", freeze)
    net = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 16))
    costs = CostTable.measure(net, (torch.randn(batch, 4, 8, 8),), densities=(0.1, 0.5), layer_ms=0.2)
    assert list(costs.layers) == ["0", "3"]


def test_allocation_of_a_large_network_takes_seconds_at_most():
    """As many blocks as a ResNet-50 has."""
    net = nn.Sequential(*[nn.Conv2d(512, 512, 3, padding=1, bias=False) for _ in range(10)])
    layers = {str(i): cost(20.0 + i, (0.1, 4.0), (0.5, 15.0), pattern="16x1") for i in range(10)}
    units = prunable_layers(net, "block", BlockPattern(16, 1), None, None)
    meter = Timed(table_of(net, layers), net, units, COST_FLOOR)
    rule = Rule("cost", "lamp", COST_FLOOR, torch.Generator())
    best = min(_seconds(lambda: rule.kept(units, meter, 100.0, None)) for _ in range(3))
    assert sum(layer.col_idx.numel() for layer in net) > 1.4e6 and best < 10.0  # alone it takes less than one


def _seconds(call):
    began = time.thread_time()  # not the time of others on a busy machine
    call()
    return time.thread_time() - began


def test_sparsify_prunes_on_and_leaves_whole_layers_dense():
    net = student()
    table = table_of(
        net,
        {"0": cost(30.0, (0.1, 5.0)), "3": cost(40.0, (0.1, 5.0)), "8": cost(1.0, (0.1, 2.0))},
        inputs=((2, 3, 16, 16),),
    )
    sparsekd.sparsify(net, BlockPattern(4, 1), latency_us=50, costs=table, example_inputs=(IMAGE,))
    assert type(net[8]) is nn.Linear and table.predict(net) == pytest.approx(50, abs=0.3)
    sparsekd.sparsify(net, BlockPattern(4, 1), latency_us=30, costs=table, example_inputs=(IMAGE,))
    assert type(net[8]) is nn.Linear and table.predict(net) == pytest.approx(30, abs=0.3)


class Named(nn.Module):
    """Takes its inputs by name, or in a dict."""

    def __init__(self, in_a_dict):
        super().__init__()
        self.left, self.right, self.in_a_dict = nn.Linear(32, 32), nn.Linear(16, 32), in_a_dict

    def forward(self, batch=None, *, x=None, y=None):
        if self.in_a_dict:
            x, y = batch["x"], batch["y"]
        return self.left(x) + self.right(y)


@pytest.mark.parametrize("in_a_dict", [False, True])
def test_examples_by_name_and_in_a_dict(in_a_dict):
    named = {"x": torch.randn(4, 32), "y": torch.randn(4, 16)}
    example = (named,) if in_a_dict else named
    model = sparsekd.sparsify(Named(in_a_dict), BlockPattern(16, 1), macs=0.75, example_inputs=example)
    assert count_macs(model, example) == (32 * 48, 0.75 * 32 * 48)
    assert Pruner(Named(in_a_dict), example_inputs=example).macs == (32 * 48, 32 * 48)


@pytest.mark.skipif(cpu.native is None, reason="no compiled kernels")
@pytest.mark.parametrize("in_a_dict", [False, True])
def test_a_network_is_measured_by_inputs_with_names(in_a_dict):
    named = {"x": torch.randn(4, 32), "y": torch.randn(4, 16)}
    example = (named,) if in_a_dict else named
    costs = CostTable.measure(Named(in_a_dict), example, pattern=BlockPattern(16, 1), layer_ms=0.5)
    assert costs.layers.keys() == {"left", "right"} and costs.batch == 4 and costs.inputs == ((4, 32), (4, 16))


@pytest.mark.skipif(cpu.native is None, reason="no compiled kernels")
def test_a_compiled_network_is_measured_under_its_names():
    net = torch.compile(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), backend="eager")
    costs = CostTable.measure(net, torch.randn(4, 32), pattern=BlockPattern(16, 1), densities=(0.5,), layer_ms=0.5)
    assert list(costs.layers) == ["_orig_mod.0"]
    assert costs.predict(sparsekd.sparsify(net, BlockPattern(16, 1), 0.5)) > 0
