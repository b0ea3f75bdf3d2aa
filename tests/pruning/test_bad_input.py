"""What a Pruner refuses, and what it says."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import sparsekd
from sparsekd import BlockPattern
from sparsekd.pruning import Pruner

from .common import (
    Net,
    nonzeros,
    pruner_of,
)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_a_share_outside_the_range_is_refused(share):
    with pytest.raises(ValueError, match=r"removed_share must lie in \[0, 1\)"):
        pruner_of(Net()).prune_to(share)


def test_what_is_gone_does_not_come_back():
    pruner = pruner_of(Net())
    pruner.prune_to(0.5)
    kept = pruner.num_kept
    pruner.prune_to(0.5)
    assert pruner.num_kept == kept
    with pytest.raises(ValueError, match=r"do not come back, got 0.2"):
        pruner.prune_to(0.2)


def test_diverged_weights_are_refused():
    net = Net()
    pruner = pruner_of(net)
    with torch.no_grad():
        net.conv2.values[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in layer 'conv2'"):
        pruner.prune_to(0.5)
    assert pruner.num_kept == pruner.num_weights


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"include": ["covn*"]}, "include pattern 'covn\\*' names no"),
        ({"exclude": ["*"]}, "no layer to prune"),
        ({"granularity": "blocks"}, "granularity must be one of block, filter, unstructured, got 'blocks'"),
        ({"scope": "all"}, "scope must be one of"),
        ({"score": "taylor"}, "score must be one of"),
        ({"granularity": "filter", "pattern": BlockPattern(4, 1)}, "a pattern belongs to granularity 'block'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        Pruner(Net(), **options)


def test_a_sparse_model_of_another_pattern_is_no_filter_model():
    with pytest.raises(ValueError, match=r"pattern 4x1, whose blocks span several filters; densify"):
        Pruner(sparsekd.sparsify(Net(), BlockPattern(4, 1)), granularity="filter")


def test_a_model_that_is_sparse_already_is_pruned_on():
    net = sparsekd.sparsify(Net(), BlockPattern(4, 1), density=0.5, include=["conv2"])
    pruner = pruner_of(net, include=["conv2"])
    assert pruner.num_weights == 10 * 21 * 9
    assert pruner.num_kept == nonzeros(net.conv2) < 0.6 * pruner.num_weights
    pruner.prune_to(0.75)
    assert pruner.removed_share == pytest.approx(0.75, abs=0.01)


def test_an_optimizer_made_too_early_is_refused():
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    pruner = pruner_of(net)
    with pytest.raises(ValueError, match=r"holds none of the pruned layers' parameters; make it .* after the Pruner"):
        pruner.attach(optimizer)
    with pytest.raises(TypeError, match="expected a torch optimizer, got Net"):
        pruner.attach(net)
    with pytest.raises(TypeError, match="the state of Rprop"):
        pruner.attach(torch.optim.Rprop(net.parameters()))


def test_every_pruned_weight_must_be_in_an_attached_optimizer():
    net = Net()
    pruner = pruner_of(net)
    rest = [parameter for name, parameter in net.named_parameters() if name != "conv2.values"]
    pruner.attach(SGD(rest, lr=0.1))
    with pytest.raises(RuntimeError, match="the weights of conv2 are in no attached optimizer"):
        pruner.prune_to(0.5)
    pruner.attach(SGD([net.conv2.values], lr=0.1))
    pruner.prune_to(0.5)


def test_str_says_when_nothing_gets_faster():
    assert "masks only, nothing gets faster" in str(pruner_of(Net(), "unstructured"))
    pruner = pruner_of(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16 * 4, 3)))
    counts = "0.0% of 264 weights and 0.0% of 1344 multiply-adds in 2 layers removed"
    assert str(pruner) == f"Pruner(block 4x3, global magnitude: {counts})"
    blind = pruner_of(nn.Sequential(nn.Linear(8, 8)), example_inputs=None)
    assert str(blind) == "Pruner(block 4x3, global magnitude: 0.0% of 64 weights in 1 layers removed)"
    assert pruner.makes_faster and not pruner_of(Net(), "unstructured").makes_faster


@pytest.mark.parametrize("granularity", ["block", "unstructured"])
def test_layers_that_left_the_model_are_not_pruned_on(granularity):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    pruner = Pruner(model, granularity=granularity, scope="global")
    pruner.prune_to(0.2)
    model[2] = nn.Linear(16, 16)
    with pytest.raises(RuntimeError, match="layer '2' is no longer in the model"):
        pruner.prune_to(0.4)


def test_an_optimizer_that_cannot_follow_is_refused_before_it_steps():
    model = nn.Sequential(nn.Linear(16, 16))
    pruner = Pruner(model)
    with pytest.raises(TypeError, match="the state of Adafactor can be neither shrunk"):
        pruner.attach(torch.optim.Adafactor(model.parameters()))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: sparsekd.sparsify(m, macs="0.3", example_inputs=(torch.ones(1, 16),)), TypeError, "text '0.3'"),
        (lambda m: Pruner(m).prune_to("0.3"), TypeError, "removed_share must be a number, got the text '0.3'"),
        (lambda m: sparsekd.sparsify(type(m), density=0.3), TypeError, "got the class Sequential"),
        (lambda m: sparsekd.sparsify(m.state_dict(), density=0.3), TypeError, "got OrderedDict"),
        (lambda m: sparsekd.sparsify(m, density=0.3, exclude="0"), TypeError, r"pass \['0'\]"),
    ],
)
def test_arguments_of_another_type(call, error, says):
    with pytest.raises(error, match=says):
        call(nn.Sequential(nn.Linear(16, 16)))
