"""Budgets in weights, multiply-adds, bytes and microseconds: met to one unit, floors kept, nothing pruned in vain."""

import copy
import json
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekd
from sparsekd import BlockPattern
from sparsekd.backends import cpu
from sparsekd.pruning import Budget, CostTable, LayerCost, Pruner
from sparsekd.pruning.cost import network_of

from ..cases import through_files
from .common import GRANULARITIES, Net, dense_weights, pruner_of

X = torch.randn(2, 2, 6, 6)
PIXELS = {"conv1": 36, "conv2": 9, "head": 1}  # of an output of Net, for an image of 6 x 6


def macs_of(net):
    """Multiply-adds of the weights that are there, counted by hand: a block that came back is there, too."""
    layers = {name: net.get_submodule(name) for name in PIXELS}
    if all(hasattr(layer, "values") for layer in layers.values()):
        ones = {name: copy.deepcopy(layer) for name, layer in layers.items()}
        for layer in ones.values():
            layer.values.data.fill_(1.0)
        return sum(PIXELS[name] * int(layer.weight.sum()) for name, layer in ones.items())
    return sum(PIXELS[name] * int((layer.weight != 0).sum()) for name, layer in layers.items())


def bytes_of(net):
    return sum(m.values.numel() * 4 + m.col_idx.numel() * 4 for m in net.modules() if hasattr(m, "col_idx"))


# What a budget is


@pytest.mark.parametrize(
    ("removed", "numbers", "dense", "now", "excess"),
    [
        (True, {"macs": 0.7}, 200.0, 200.0, 140.0),
        (True, {"macs": 0.7}, 200.0, 100.0, 40.0),
        (True, {"weights": 0.0}, 200.0, 150.0, -50.0),
        (False, {"macs": 0.3}, 200.0, 200.0, 140.0),
        (False, {"bytes": 1.0}, 200.0, 200.0, 0.0),
        (True, {"latency_us": 80.0}, 200.0, 100.0, 20.0),
        (False, {"latency_us": 80.0}, 200.0, 100.0, 20.0),
    ],
)
def test_shares_and_absolute_numbers(removed, numbers, dense, now, excess):
    budget = Budget.of("x", removed, **{"weights": None, **numbers})
    assert budget.excess(dense, now) == pytest.approx(excess)


@pytest.mark.parametrize(
    ("removed", "numbers", "says"),
    [
        (
            True,
            {"macs": 0.5, "weights": 0.5},
            "expected one budget of weights, macs, bytes, latency_us, got macs, weig",
        ),
        (True, {"macs": None}, "got none"),
        (True, {"macs": 1.0}, r"macs must be a share in \[0, 1\) of the dense network, or a number of multiply-adds"),
        (False, {"bytes": 0.0}, r"bytes must be a share in \(0, 1\]"),
        (True, {"weights": -0.1}, "got -0.1"),
        (True, {"latency_us": float("nan")}, "got nan"),
        (True, {"joules": 0.5}, "a budget counts one of weights, macs, bytes, latency_us, got 'joules'"),
    ],
)
def test_numbers_that_are_no_budget(removed, numbers, says):
    with pytest.raises(ValueError, match=says):
        Budget.of("x", removed, **numbers)


# Multiply-adds and bytes


@pytest.mark.parametrize("scope", ["global", "layer", "cost"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_a_budget_of_work_is_met_to_one_unit(granularity, scope, data):
    torch.manual_seed(data.draw(st.integers(0, 9)))
    net = Net()
    pruner = pruner_of(net, granularity, BlockPattern(4, 1), scope=scope, rewindable=False, example_inputs=(X,))
    original = macs_of(net)
    assert pruner.macs == (original, original) == (36 * 180 + 9 * 1890 + 63,) * 2
    largest = {"block": 4 * 36, "filter": 2 * 9 * 36, "unstructured": 36}[granularity]
    for target in sorted(data.draw(st.lists(st.floats(0, 0.8), min_size=1, max_size=3))):
        pruner.prune_to(macs=target)
        pruner.check()
        assert pruner.macs == (original, macs_of(net))
        assert abs(macs_of(net) - (1 - target) * original) <= max(largest, 90 * 9 if granularity == "filter" else 0)
    if granularity != "unstructured":
        pruner.grow_to(macs=0.1)
        assert macs_of(net) == pytest.approx(0.9 * original, abs=max(largest, 90 * 9))


def test_absolute_numbers_say_what_stays():
    for unit, count, number, grain in (("macs", macs_of, 9000, 4 * 36), ("bytes", bytes_of, 4000, 20)):
        net = Net()
        pruner = pruner_of(net, pattern=BlockPattern(4, 1), scope="cost")
        pruner.prune_to(**{unit: number})
        assert count(net) == pytest.approx(number, abs=grain), unit
        pruner.grow_to(**{unit: 2 * number})
        assert count(net) == pytest.approx(2 * number, abs=grain), unit


def test_cost_takes_where_a_weight_is_used_most_and_weights_do_not():
    """Two layers of equal weights, one on nine times as many pixels: for the same magnitude its units cost nine times
    as much."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=3))
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(torch.linspace(1, 2, layer.weight.numel()).view_as(layer.weight))
    kept = {}
    for scope in ("global", "cost"):
        model = copy.deepcopy(net)
        pruner = Pruner(model, pattern=BlockPattern(1, 1), scope=scope, example_inputs=(torch.randn(1, 8, 9, 9),))
        assert pruner.macs[0] == 576 * (81 + 9)
        pruner.prune_to(macs=0.5)
        assert pruner.macs[1] == pytest.approx(0.5 * pruner.macs[0], abs=81)
        kept[scope] = [layer.num_kept / 576 for layer in model]
    assert kept["global"][0] == pytest.approx(kept["global"][1], abs=0.01)
    assert kept["cost"][0] == pytest.approx(4 / 9, abs=0.01) and kept["cost"][1] == 1.0


def test_every_layer_keeps_its_floor():
    net = Net()
    with torch.no_grad():
        net.conv2.weight *= 1e-6
    pruner = pruner_of(net, pattern=BlockPattern(1, 1), scope="cost", floor=0.1)
    pruner.prune_to(macs=0.7)
    shares = {name: float((weight != 0).double().mean()) for name, weight in dense_weights(net).items()}
    assert shares["conv2"] == pytest.approx(0.1, abs=0.001) and min(shares.values()) > 0.099
    with pytest.raises(
        ValueError, match=r"macs=0.95 cannot be reached: one unit of each layer stays, and 0.1 of its w"
    ):
        pruner.prune_to(macs=0.95)


def test_the_smallest_budget_is_named_and_can_be_met():
    for unit in ("weights", "macs", "bytes"):
        pruner = pruner_of(Net(), pattern=BlockPattern(16, 3))
        with pytest.raises(
            ValueError, match=rf"{unit}=0.99 cannot be reached.*largest part of it is 'conv\d'"
        ) as error:
            pruner.prune_to(**{unit: 0.99})
        smallest = float(str(error.value).partition("so that ")[2].partition("=")[2].split()[0])
        pruner.prune_to(**{unit: smallest})
        assert all(1 <= mask.sum() <= 2 for mask in pruner.masks().values())


def test_random_is_random_whatever_a_unit_costs():
    net = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, stride=3))
    pruner = Pruner(
        net, pattern=BlockPattern(1, 1), scope="cost", score="random", example_inputs=(torch.randn(1, 8, 9, 9),)
    )
    pruner.prune_to(macs=0.5)
    assert [layer.density for layer in net] == pytest.approx([0.5, 0.5], abs=0.05)


def test_a_state_knows_the_work():
    saved = pruner_of(Net()).state_dict()
    pruner = pruner_of(Net(), example_inputs=None)
    assert pruner.macs is None
    pruner.load_state_dict(through_files(saved))
    assert pruner.macs[0] == 36 * 180 + 9 * 1890 + 63
    pruner.prune_to(macs=0.5)


@pytest.mark.parametrize(
    ("make", "call", "says"),
    [
        ({}, lambda p: p.prune_to(0.5, macs=0.5), "expected one budget of .*, got weights, macs"),
        ({}, lambda p: p.prune_to(0.5, weights=0.5), "removed_share counts weights, got weights=0.5 too"),
        ({}, lambda p: p.prune_to(), "got none"),
        ({"example_inputs": None}, lambda p: p.prune_to(macs=0.5), "BatchNorm2d layers"),
        ({}, lambda p: p.prune_to(latency_us=0.5), "latency_us needs the costs of layers; give Pruner"),
        ({"granularity": "unstructured"}, lambda p: p.prune_to(bytes=0.5), "masks on dense layers save no bytes"),
        ({}, lambda p: (p.prune_to(macs=0.5), p.prune_to(macs=0.2)), r"at macs=0.5\d*, .* do not come back, got 0.2"),
        ({}, lambda p: p.grow_to(macs=0.5), "at macs=0, got 0.5; prune_to removes more"),
    ],
)
def test_budgets_that_are_refused(make, call, says):
    pruner = pruner_of(Net(), **make)
    with pytest.raises(ValueError, match=says):
        call(pruner)


def test_layers_that_the_example_never_calls_have_no_macs():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    pruner = Pruner(Spare(), example_inputs=(torch.randn(2, 8),))
    assert pruner.macs is None
    with pytest.raises(ValueError, match=r"the example never called layer 'spare'.*exclude=\['spare'\]"):
        pruner.prune_to(macs=0.5)
    blind = Pruner(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="macs are counted on an example; give Pruner"):
        blind.prune_to(macs=0.5)


def test_work_of_all_kinds_of_layers():
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.twice = nn.Linear(6, 4), nn.Conv2d(4, 4, 3, padding=1, groups=2)

        def forward(self, x):  # [N, 5, 6]
            y = self.tokens(x)
            z = y.transpose(1, 2).unsqueeze(-1)  # [N, 4, 5, 1]
            return self.twice(self.twice(z))

    pruner = Pruner(Kinds(), granularity="unstructured", example_inputs=(torch.randn(3, 5, 6),))
    assert pruner.macs[0] == 5 * 24 + 2 * 5 * (4 * 2 * 9)


# Microseconds


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
        net, pattern=BlockPattern(1, 1), scope="cost", floor=0.0, costs=table_of(net, layers, inputs=((1, 16),))
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
    assert "the largest part of it is 'conv1'" in str(error.value)
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


@pytest.mark.skipif(cpu.native is None, reason="no compiled kernels")
def test_a_network_is_measured():
    net = nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 16)
    )
    x = torch.randn(1, 4, 8, 8)
    costs = CostTable.measure(net, (x,), densities=(0.1, 0.5), layer_ms=1.0)
    assert list(costs.layers) == ["0", "4"] and costs.batch == 1 and costs.inputs == ((1, 4, 8, 8),)
    assert costs.isa == cpu.native.isa() and costs.threads == torch.get_num_threads()
    assert all(layer.dense_us > 0 and layer.pattern == "16x1" for layer in costs.layers.values())
    assert type(net[0]) is nn.Conv2d and net.training  # left as it is
    sparse = sparsekd.sparsify(copy.deepcopy(net), density=0.1)
    assert costs.rest_us < costs.predict(sparse) <= costs.predict(net) == costs.dense_us
    pruner = Pruner(net, scope="cost", floor=0.0, costs=costs, example_inputs=(x,))
    least = costs.rest_us + sum(layer.us(0.0) for layer in costs.layers.values())
    if least < 0.9 * costs.dense_us:  # on a busy machine there may be nothing to gain
        pruner.prune_to(latency_us=(least + costs.dense_us) / 2)


def test_allocation_of_a_large_network_takes_seconds_at_most():
    """As many blocks as a ResNet-50 has."""
    net = nn.Sequential(*[nn.Conv2d(512, 512, 3, padding=1, bias=False) for _ in range(10)])
    layers = {str(i): cost(20.0 + i, (0.1, 4.0), (0.5, 15.0), pattern="16x1") for i in range(10)}
    pruner = Pruner(net, pattern=BlockPattern(16, 1), scope="cost", rewindable=False, costs=table_of(net, layers))
    meter = pruner._meters.of("test", "latency_us")
    best = min(_seconds(lambda: pruner._rule.kept(pruner._layers, meter, 100.0, None)) for _ in range(3))
    assert sum(layer.col_idx.numel() for layer in net) > 1.4e6 and best < 2.0  # other work slows a shared core down


def _seconds(call):
    began = time.thread_time()  # not the time of others on a busy machine
    call()
    return time.thread_time() - began
