"""Budgets in weights, multiply-adds, bytes and microseconds: met to one unit, floors kept, nothing pruned in vain."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekd
from sparsekd import BlockPattern
from sparsekd.pruning import Budget, Pruner

from ..cases import through_files
from .common import GRANULARITIES, IMAGE, WORK, Net, dense_weights, pruner_of, student

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
        half = (1 - macs_of(net) / original) / 2
        pruner.grow_to(macs=half)
        assert macs_of(net) == pytest.approx((1 - half) * original, abs=max(largest, 90 * 9))


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
        example = (torch.randn(1, 8, 9, 9),)
        pruner = Pruner(model, pattern=BlockPattern(1, 1), scope=scope, score="magnitude", example_inputs=example)
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
    pruner = pruner_of(net, pattern=BlockPattern(1, 1), scope="cost", score="magnitude", floor=0.1)
    pruner.prune_to(macs=0.7)
    shares = {name: float((weight != 0).double().mean()) for name, weight in dense_weights(net).items()}
    assert shares["conv2"] == pytest.approx(0.1, abs=0.001) and min(shares.values()) > 0.099
    with pytest.raises(
        ValueError, match=r"macs=0.95 cannot be reached: one unit of each layer stays, and 0.1 of its w"
    ):
        pruner.prune_to(macs=0.95)


def test_a_model_is_observed_without_gradients():
    net, seen = Net(), []
    net.conv1.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    Pruner(net, scope="cost", example_inputs=torch.randn(2, 2, 12, 12))
    assert seen and not any(seen)


def test_a_single_tensor_may_stand_for_the_inputs():
    one, other = Net(), Net()
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 2, 12, 12)
    sparsekd.sparsify(one, macs=0.5, example_inputs=(x,))
    sparsekd.sparsify(other, macs=0.5, example_inputs=x)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("unit", ["weights", "macs", "bytes"])
def test_the_smallest_budget_is_named_and_can_be_met(unit):
    pruner = pruner_of(Net(), pattern=BlockPattern(1, 1))
    wanted = rf"{unit}=0.9999 cannot be reached.*can go; the largest part of what stays is 'conv1'; remove less"
    with pytest.raises(ValueError, match=wanted) as error:
        pruner.prune_to(**{unit: 0.9999})
    smallest = float(str(error.value).partition("so that ")[2].partition("=")[2].split()[0])
    pruner.prune_to(**{unit: smallest})
    assert all(1 <= mask.sum() <= 2 for mask in pruner.masks().values())


def test_cost_goes_by_lamp_unless_told_otherwise():
    assert {scope: pruner_of(Net(), scope=scope).score for scope in ("cost", "global", "layer")} == {
        "cost": "lamp",
        "global": "magnitude",
        "layer": "magnitude",
    }
    assert pruner_of(Net(), scope="cost", score="magnitude").score == "magnitude"


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
        ({}, lambda p: p.prune_to(Budget("macs", 0.3, True), macs=0.7), "one budget, got macs=0.3 and macs= too"),
        ({}, lambda p: p.prune_to(), "got none"),
        ({"example_inputs": None}, lambda p: p.prune_to(macs=0.5), "BatchNorm2d layers"),
        ({}, lambda p: p.prune_to(latency_us=0.5), "latency_us needs the costs of layers; give Pruner"),
        ({"granularity": "unstructured"}, lambda p: p.prune_to(bytes=0.5), "masks on dense layers save no bytes"),
        ({}, lambda p: (p.prune_to(macs=0.5), p.prune_to(macs=0.2)), r"at macs=0.5\d*, .* do not come back, got 0.2"),
        ({}, lambda p: p.prune_to(macs=1e9), r"macs=1e\+09 is to stay, but the dense network has only \d+ mult"),
        ({}, lambda p: (p.prune_to(macs=0.5), p.prune_to(weights=1e9)), r"but the dense network has only \d+ weights;"),
        ({}, lambda p: (p.prune_to(weights=0.5), p.prune_to(weights=2000)), "do not come back, got 2000; grow_to"),
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


# A model that is pruned once


def test_sparsify_to_a_share_of_the_work():
    for number in (0.3, 0.3 * sum(WORK.values())):
        net = student()
        x = copy.deepcopy(net).eval()(IMAGE)
        assert sparsekd.sparsify(net, BlockPattern(4, 1), macs=number, example_inputs=(IMAGE,)) is net
        layers = {name: net.get_submodule(name) for name in WORK}
        left = sum(WORK[name] * getattr(layer, "density", 1.0) for name, layer in layers.items())
        assert left == pytest.approx(0.3 * sum(WORK.values()), abs=4 * 256)
        assert net.training and net.eval()(IMAGE).shape == x.shape
    for unit in ("weights", "bytes"):
        net = sparsekd.sparsify(student(), BlockPattern(4, 1), **{unit: 0.4}, example_inputs=(IMAGE,))
        assert Pruner(net, example_inputs=(IMAGE,)).num_kept <= 0.4 * sum(p.numel() for p in student().parameters())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"macs": 0.3}, r"sparsify: multiply-adds are those of an example; give example_inputs"),
        ({"macs": 0.3, "density": 0.5, "example_inputs": (IMAGE,)}, "a density is a budget of weights in every layer"),
        ({"macs": 0.3, "weights": 0.5, "example_inputs": (IMAGE,)}, "sparsify: expected one budget"),
        ({"macs": 0.0, "example_inputs": (IMAGE,)}, r"macs must be a share in \(0, 1\]"),
        ({"macs": 0.001, "example_inputs": (IMAGE,)}, "cannot be reached: one unit of each layer stays, and 0.02"),
    ],
)
def test_a_budget_that_cannot_be_leaves_the_model_as_it_was(arguments, says):
    net = student()
    with pytest.raises(ValueError, match=says):
        sparsekd.sparsify(net, BlockPattern(4, 1), **arguments)
    assert [type(net[i]) for i in (0, 3, 8)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
