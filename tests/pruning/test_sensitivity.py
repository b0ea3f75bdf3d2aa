"""A scan says which layer hurts, leaves the model alone, and its scores keep what hurts."""

import copy

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import BlockPattern
from sparsekd.pruning import Pruner, Sensitivity, sensitivity

from .common import dense_weights


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4))


def faithful_to(model, x):
    """Minus the error beside the model as it was."""
    want = copy.deepcopy(model).eval()(x)
    return lambda network: -float((network(x) - want).detach().square().mean())


def test_each_layer_is_pruned_alone():
    net, x = network(), torch.randn(64, 16)
    score = faithful_to(net, x)
    state = copy.deepcopy(net.state_dict())
    scan = sensitivity(net, score, densities=(0.5, 0.25), pattern=BlockPattern(4, 1), exclude=["3"])
    assert net.training and all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert scan.whole == 0.0 and scan.densities == (0.5, 0.25) and list(scan.layers) == ["0", "2"]
    for name in ("0", "2"):
        for density, found, lost in zip(scan.densities, scan.layers[name], scan.energy_lost[name], strict=True):
            by_hand = sparsekd.sparsify(copy.deepcopy(net), BlockPattern(4, 1), density, include=[name])
            assert found == pytest.approx(score(by_hand), rel=1e-4)
            weight = net.get_submodule(name).weight
            assert lost == pytest.approx(
                float((weight.square() * (dense_weights(by_hand)[name] == 0)).sum().detach()), rel=1e-5
            )
        assert scan.layers[name][1] < scan.layers[name][0] < 0
    lines = str(scan).splitlines()
    assert lines[0].split() == ["layer", "at", "0.5", "at", "0.25"] and lines[-1] == "whole: 0"
    assert Sensitivity(**{**scan.to_dict(), "densities": scan.densities}).worth() == scan.worth()


def test_scores_keep_the_layer_that_hurts():
    net, x = network(), torch.randn(64, 16)
    with torch.no_grad():
        net[2].weight *= 1e-3  # small weights, whose outputs the next layer blows up
        net[2].bias.zero_()
        net[3].weight *= 1e3
    scan = sensitivity(net, faithful_to(net, x), densities=(0.5,), pattern=BlockPattern(4, 1), exclude=["3"])
    kept = {}
    for name in ("magnitude", "scan"):
        model = copy.deepcopy(net)
        pruner = Pruner(model, pattern=BlockPattern(4, 1), exclude=["3"])
        pruner.prune_to(0.4, scan.scores(pruner) if name == "scan" else None)
        kept[name] = [model[0].density, model[2].density]
    assert kept["magnitude"][1] < 0.3 < kept["scan"][1]
    unstructured = Pruner(copy.deepcopy(net), granularity="unstructured", exclude=["3"])
    unstructured.prune_to(0.4, scan.scores(unstructured))
    assert unstructured.removed_share == pytest.approx(0.4, abs=0.01)


def test_layers_that_lose_nothing_are_not_worthless():
    scan = Sensitivity(1.0, (0.5,), {"a": (0.5,), "b": (0.8,), "c": (1.1,)}, {"a": (1.0,), "b": (1.0,), "c": (1.0,)})
    assert scan.worth() == pytest.approx({"a": 0.5, "b": 0.2, "c": 0.02})
    flat = Sensitivity(1.0, (0.5,), {"a": (1.0,), "b": (1.0,)}, {"a": (1.0,), "b": (2.0,)})
    assert flat.worth() == {"a": 1.0, "b": 1.0}


def test_bad_scans():
    with pytest.raises(ValueError, match="expected a finite score of the whole model, got nan"):
        sensitivity(network(), lambda model: float("nan"))
    with pytest.raises(ValueError, match="no layer to prune"):
        sensitivity(nn.Sequential(nn.Tanh()), lambda model: 0.0)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        sensitivity(network(), lambda model: 0.0, densities=(0.0,))
    net = network()
    scan = sensitivity(net, lambda model: 0.0, exclude=["3"], pattern=BlockPattern(4, 1))
    with pytest.raises(ValueError, match="the scan did not see 3"):
        scan.scores(Pruner(net, pattern=BlockPattern(4, 1)))
