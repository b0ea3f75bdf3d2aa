"""What comes back is zero everywhere, exactly to a target, and nothing else changes a bit."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Adagrad

import sparsekd
from sparsekd import BlockPattern
from sparsekd.nn import SparseConv2d
from sparsekd.pruning import CostTable, DenseGradients, Grouping, LayerCost, Pruner, grow_blocks
from sparsekd.pruning.cost import network_of
from sparsekd.pruning.held import ALIVE

from ..cases import through_files
from .common import (
    GRANULARITIES,
    OPTIMIZERS,
    Net,
    attached,
    batch,
    dead_channels,
    dense_weights,
    nonzeros,
    pruner_of,
    train_step,
)

EVEN = BlockPattern(2, 1)


class EvenNet(nn.Module):
    """Blocks of 2x1 fit exactly, so that every unit of a block pruner has two weights. Linear layers feed batch norms
    of one dimension."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.hidden, self.bn3 = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x))).mean((2, 3))
        return self.head(torch.relu(self.bn3(self.hidden(x))))


def dense_state(layer, tensor):
    """A tensor of the parameter's shape as a dense weight, zeros where nothing is kept."""
    if isinstance(layer, nn.Module) and hasattr(layer, "values"):
        blocks = layer.blocks
        return type(blocks)(tensor.detach(), blocks.row_ptr, blocks.col_idx, blocks.shape, blocks.pattern).to_dense()
    return tensor.detach().clone()


def picture(net, pruner, optimizer):
    """Everything that hangs on a prunable weight as dense tensors, by (layer, what); and what is kept, by layer."""
    found = {}
    kept = {}
    for name, layer in pruner.layers().items():
        parameter = layer.values if hasattr(layer, "values") else layer.weight
        found[name, "weight"] = dense_state(layer, parameter)
        for key, state in optimizer.state.get(parameter, {}).items():
            if state.dim():
                found[name, key] = dense_state(layer, state)
        mask = pruner.masks()[name]
        if mask.shape != found[name, "weight"].shape:
            pattern = layer.pattern
            mask = mask.repeat_interleave(pattern.bh, 0).repeat_interleave(pattern.bw, 1)
        kept[name] = mask[: found[name, "weight"].shape[0], : found[name, "weight"].shape[1]]
    return found, kept


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_sequence_leaves_exactly_what_was_planned(granularity, scope, data):
    """After any sequence of prunes, growths, exchanges, steps and restarts: the count is the target, survivors keep
    their bits in values, optimizer and theta0, and what came back is zero in all of them."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kind = data.draw(st.sampled_from(list(OPTIMIZERS)))
    x, y = torch.randn(6, 2, 5, 5), torch.randn(6, 4)

    def build():
        net = EvenNet()
        pattern = EVEN if granularity == "block" else None
        pruner = Pruner(net, granularity=granularity, pattern=pattern, scope=scope, example_inputs=(x,))
        optimizer = OPTIMIZERS[kind](net.parameters())
        pruner.attach(optimizer)
        return net, pruner, optimizer

    net, pruner, optimizer = build()
    theta0 = dense_weights(net)
    original, unit = nonzeros(net), {"block": 2, "filter": 9 * 4, "unstructured": 1}[granularity]
    never_left = {name: weight != 0 for name, weight in theta0.items()}
    for action in data.draw(st.lists(st.sampled_from(["prune", "grow", "exchange", "step", "files"]), max_size=7)):
        removed = pruner.removed_share
        values, kept = picture(net, pruner, optimizer)
        if action == "step":
            train_step(net, optimizer, x, y)
            pruner.after_step()
            continue
        if action == "files":
            model_state, pruner_state = (through_files(part.state_dict()) for part in (net, pruner))
            optimizer_state = copy.deepcopy(optimizer.state_dict())
            net, pruner, optimizer = build()
            pruner.load_state_dict(pruner_state)
            net.load_state_dict(model_state)
            optimizer.load_state_dict(optimizer_state)
            after, kept_after = picture(net, pruner, optimizer)
            assert after.keys() == values.keys()
            assert all(torch.equal(after[key], values[key]) for key in values)
            assert all(torch.equal(kept_after[name], kept[name]) for name in kept)
            continue
        target = removed
        if action == "prune":
            target = data.draw(st.floats(min(removed, 0.8), 0.8))
            target = max(target, removed)
            pruner.prune_to(target)
        elif action == "grow":
            target = data.draw(st.floats(0, removed))
            pruner.grow_to(target)
        else:
            share = min(0.3, 0.9 * removed / (1 - removed))
            pruner.exchange(share)
        pruner.check()
        after, kept_after = picture(net, pruner, optimizer)
        counted = sum(int(mask.sum()) for mask in kept_after.values())
        assert pruner.num_kept == counted
        if granularity == "filter":
            assert abs(counted - (1 - target) * original) <= 2 * unit  # filters differ in size
        elif action == "exchange":
            assert counted == round((1 - removed) * original)
        else:
            assert abs(counted - (1 - target) * original) <= unit / 2
        for (name, key), before in values.items():
            stayed, came = kept[name] & kept_after[name], kept_after[name] & ~kept[name]
            assert torch.equal(after[name, key][stayed], before[stayed]), (name, key)
            assert not after[name, key][came].any() and not after[name, key][~kept_after[name]].any(), (name, key)
            never_left[name] = never_left[name] & kept_after[name]
    _, kept = picture(net, pruner, optimizer)
    pruner.rewind()
    pruner.check()
    for name, weight in dense_weights(net).items():
        assert torch.equal(weight, theta0[name] * never_left[name])  # what was away begins at zero


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradient_and_optimizer_state_grow_along(kind):
    layer = SparseConv2d(5, 9, 3, pattern=BlockPattern(4, 2), density=0.4)
    optimizer = OPTIMIZERS[kind]([layer.values])
    x = torch.randn(2, 5, 6, 6)
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
    before, parameter = layer.to_dense().weight.detach(), layer.values
    kept, moments = layer.block_mask(), {k: v.clone() for k, v in optimizer.state[parameter].items() if v.dim()}
    gradient = parameter.grad.clone()
    mask = torch.rand(kept.shape) < 0.5
    survives = grow_blocks(layer, mask, [optimizer])
    assert layer.values is parameter and torch.equal(layer.block_mask(), kept | mask)
    assert torch.equal(layer.to_dense().weight, before)
    assert torch.equal(parameter.grad[survives], gradient) and not parameter.grad[~survives].any()
    assert moments
    for key, moment in moments.items():
        state = optimizer.state[parameter][key]
        assert torch.equal(state[survives], moment) and not state[~survives].any(), key
    layer.blocks.validate()
    layer(x).sum().backward()
    optimizer.step()


def test_state_that_does_not_start_at_zero_starts_where_its_optimizer_says():
    layer = SparseConv2d(4, 8, 3, pattern=BlockPattern(4, 1), density=0.5)
    optimizer = Adagrad([layer.values], initial_accumulator_value=0.25)
    survives = grow_blocks(layer, torch.ones_like(layer.block_mask()), [optimizer])
    assert optimizer.state[layer.values]["sum"][~survives].eq(0.25).all() and not survives.all()


@pytest.mark.parametrize(
    ("scope", "came"),
    [("global", {"0": [0, 2], "1": []}), ("layer", {"0": [0], "1": [3]})],
)
def test_growing_by_hand(scope, came):
    """The highest scores come back, over the whole network or in each layer; ties go to the earlier block."""
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0]).expand(2, 4))
    pruner = Pruner(net, pattern=BlockPattern(2, 1), scope=scope)
    pruner.prune_to(0.75)
    kept = {name: mask[0].tolist() for name, mask in pruner.masks().items()}
    assert kept == {"0": [False, True, False, False], "1": [False, True, False, False]}
    scores = {"0": torch.tensor([[5.0, 100.0, 5.0, 4.0]]), "1": torch.tensor([[2.0, 100.0, 1.0, 3.0]])}
    pruner.grow_to(0.5, scores)
    masks = {name: mask[0].tolist() for name, mask in pruner.masks().items()}
    got = {name: [i for i in range(4) if masks[name][i] and not kept[name][i]] for name in masks}
    assert got == came


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_filter_that_gets_a_weight_back_lives_and_learns(granularity):
    net, pruner, optimizer = attached("sgd", granularity, BlockPattern(4, 1))
    for _ in range(3):
        train_step(net, optimizer, *batch())
        pruner.after_step()
    dead = dead_channels(net, pruner, granularity)
    assert pruner.num_dead_parameters >= 3 * 4
    scores = {name: mask.float() for name, mask in pruner.masks().items()}
    scores["conv1"][:] = 10.0  # all of conv1 comes back first
    gone_of_conv1 = int((dense_weights(net)["conv1"] == 0).sum())
    pruner.grow_to(pruner.removed_share - gone_of_conv1 / pruner.num_weights, scores)
    assert pruner.masks()["conv1"].all()
    living = ~dead
    before = net.bn1.weight[living].clone()
    assert not net.conv1.bias[dead].any()
    assert net.bn1.weight[dead].eq(1).all() and net.bn1.bias[dead].gt(0).all()
    for parameter in (net.conv1.bias, net.bn1.weight, net.bn1.bias):
        assert not any(v[dead].any() for v in optimizer.state[parameter].values() if v is not None and v.dim())
    assert torch.equal(net.bn1.weight[living], before)
    for _ in range(4):
        train_step(net, optimizer, *batch())
        pruner.after_step()
        pruner.check()
    weight = dense_weights(net)["conv1"]
    assert weight[dead].flatten(1).any(1).all() and net.bn1.bias[dead].ne(ALIVE).any()
    pruner.rewind()
    assert not dense_weights(net)["conv1"][dead].any() and net.bn1.bias[dead].gt(0).all()


def test_a_filter_without_batch_norm_learns_again():
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    pruner = Pruner(net, granularity="filter", include=["0"])
    optimizer = OPTIMIZERS["adam"](net.parameters())
    pruner.attach(optimizer)
    pruner.prune_to(0.5)
    dead = ~dense_weights(net)["0"].flatten(1).any(1)
    assert not net[0].bias[dead].any() and dead.sum() == 4
    pruner.grow_to(0.0)
    assert net[0].bias[dead].gt(0).all() and pruner.num_dead_parameters == 0
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 2, 6, 6)).square().mean().backward()
        optimizer.step()
        pruner.after_step()
    assert dense_weights(net)["0"][dead].flatten(1).any(1).all()


def test_batch_norms_of_one_dimension_die_with_their_linear_layer_and_come_back():
    net = EvenNet()
    pruner = Pruner(net, granularity="filter", example_inputs=(torch.randn(2, 2, 5, 5),))
    assert pruner.state_dict()["batch_norms"] == {"bn1": ["conv1"], "bn2": ["conv2"], "bn3": ["hidden"]}
    with torch.no_grad():
        net.hidden.values[2:5] *= 1e-6
        net.bn3.running_mean += 1
    pruner.prune_to(0.05)
    dead = ~dense_weights(net)["hidden"].any(1)
    assert dead.tolist() == [False, False, True, True, True, False, False, False]
    for parameter in (net.bn3.weight, net.bn3.bias, net.hidden.bias):
        assert not parameter[dead].any()
    assert net.bn3.running_mean[dead].eq(0).all() and net.bn3.running_var[dead].eq(1).all()
    outputs = []
    net.bn3.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    net.eval()(torch.randn(3, 2, 5, 5))
    assert not outputs[0][:, dead].any() and outputs[0][:, ~dead].any()
    pruner.grow_to(0.0)
    assert net.bn3.weight[dead].eq(1).all() and pruner.num_dead_parameters == 0


def test_a_linear_layer_of_more_dimensions_feeds_no_batch_norm():
    """``[N, T, C]``: there the batch norm's channels are the places, not the layer's outputs."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(self.linear(x))

    pruner = Pruner(Tokens(), example_inputs=(torch.randn(2, 5, 4),))
    assert pruner.state_dict()["batch_norms"] == {}


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_any_batch_norm_has_to_be_seen_before_the_first_prune(kind):
    net = nn.Sequential(nn.Linear(8, 8), kind(8))
    pruner = Pruner(net)
    with pytest.raises(ValueError, match=rf"{kind.__name__} layers, which must die with .* observe\(x\)"):
        pruner.prune_to(0.1)


@pytest.mark.parametrize("rows", [0, 8])
def test_equal_rows_stay_equal_when_they_grow(rows):
    conv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    pruner = Pruner(conv, pattern=BlockPattern(4, 4), grouping=Grouping(rows=rows, equal=True))
    pruner.prune_to(0.7)
    kept = conv[0].block_mask()
    scores = {"0": torch.rand(kept.shape)}
    pruner.grow_to(0.4, scores)
    pruner.check()
    mask, tall = conv[0].block_mask(), max(rows // 4, 1)
    assert pruner.removed_share == pytest.approx(0.4, abs=0.02)
    assert mask[kept].all() and mask.flatten(1).sum(1).unique().numel() == 1
    came = (mask & ~kept).view(8 // tall, tall, 72)
    assert (came == came[:, :1]).all()
    worth = scores["0"].view(8 // tall, tall, 72).mean(1).masked_fill(kept.view(8 // tall, tall, 72)[:, 0], -1)
    count = int(came[0, 0].sum())
    assert torch.equal(came[:, 0], worth.argsort(1, descending=True).argsort(1) < count)


def test_dense_gradients_are_those_of_the_dense_model():
    net = nn.Sequential()
    net.conv = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="reflect")
    net.same = nn.Conv2d(8, 6, (1, 5), padding="same")
    net.flat = nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net.head = nn.Linear(24, 5)
    pruner = Pruner(net, pattern=BlockPattern(2, 3))
    pruner.prune_to(0.5)
    dense = sparsekd.densify(copy.deepcopy(net))
    with DenseGradients(pruner) as gradients:
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(4, 4, 9, 9)
            for model in (net, dense):
                model(x).square().sum().backward()
    net(torch.randn(4, 4, 9, 9)).sum().backward()  # the door is closed: this counts nowhere
    scores = gradients.scores()
    for name, mask in pruner.masks().items():
        gradient = dense.get_submodule(name).weight.grad
        want = torch.zeros(mask.shape, dtype=torch.float64)
        for index in torch.ones_like(mask).nonzero().tolist():
            row, col, *taps = index
            block = gradient[(slice(2 * row, 2 * row + 2), slice(3 * col, 3 * col + 3), *taps)]
            want[tuple(index)] = block.double().square().mean().sqrt()
        torch.testing.assert_close(scores[name], want, rtol=1e-4, atol=1e-6)
    before = pruner.masks()
    pruner.exchange(0.2, scores)
    for name, mask in pruner.masks().items():
        came, stayed_away = mask & ~before[name], ~mask & ~before[name]
        if came.any() and stayed_away.any():
            assert scores[name][came].min() >= scores[name][stayed_away].max()


def test_dense_gradients_of_masked_weights_and_an_unbatched_image():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1, bias=False))
    pruner = Pruner(net, granularity="unstructured")
    with DenseGradients(pruner) as gradients:
        net(torch.randn(2, 5, 5)).sum().backward()
    for name, score in gradients.scores().items():
        torch.testing.assert_close(score, net.get_submodule(name).weight.grad.abs())


def test_scores_are_what_prune_to_goes_by_too():
    net = Net()
    pruner = pruner_of(net, "unstructured")
    scores = {name: torch.rand(mask.shape) for name, mask in pruner.masks().items()}
    pruner.prune_to(0.5, scores)
    kept = torch.cat([scores[name][mask] for name, mask in pruner.masks().items()])
    gone = torch.cat([scores[name][~mask] for name, mask in pruner.masks().items()])
    assert gone.max() <= kept.min() and len(gone) == round(0.5 * pruner.num_weights)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p.grow_to(0.6), r"grow_to: the network is at weights=0.4\d+, got 0.6; prune_to removes more"),
        (lambda p: p.grow_to(-0.1), r"grow_to: removed_share must lie in \[0, 1\), got -0.1"),
        (lambda p: p.exchange(1.0), r"exchange: share must lie in \[0, 1\), got 1.0"),
        (lambda p: p.grow_to(0.2, {}), r"expected scores of layer 'conv1' of shape \(3, 1, 3, 3\).* got nothing"),
        (lambda p: p.grow_to(0.2, {n: m[:1] for n, m in p.masks().items()}), r"of shape \(3, 1, 3, 3\).* got \(1, 1"),
        (lambda p: p.grow_to(0.2, {**p.masks(), "bn1": torch.ones(2)}), r"got scores of bn1, which it does not prune"),
        (
            lambda p: p.grow_to(0.2, {n: m * float("nan") for n, m in p.masks().items()}),
            "expected finite scores, got NaN",
        ),
    ],
)
def test_bad_growth_changes_nothing(call, says):
    pruner = pruner_of(Net())
    pruner.prune_to(0.5)
    masks = pruner.masks()
    with pytest.raises(ValueError, match=says):
        call(pruner)
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks().items())


def test_an_exchange_needs_something_that_is_gone():
    pruner = pruner_of(Net())
    with pytest.raises(ValueError, match=r"a share of 0.5 is \d+ weights, but only 0 are gone"):
        pruner.exchange(0.5)
    pruner.exchange(0.0)
    assert pruner.num_kept == pruner.num_weights


def test_dense_gradients_that_nobody_computed():
    pruner = pruner_of(Net())
    with DenseGradients(pruner) as gradients, pytest.raises(RuntimeError, match="no gradient has reached conv1"):
        gradients.scores()


@pytest.mark.parametrize("scope", ["global", "layer", "cost"])
@pytest.mark.parametrize("unit", ["macs", "bytes"])
def test_an_exchange_counts_in_its_unit(unit, scope):
    pruner = pruner_of(Net(), pattern=BlockPattern(4, 1), scope=scope)
    pruner.prune_to(**{unit: 0.5})
    before, masks = pruner.cost(unit)[1], pruner.masks()
    pruner.exchange(0.3, unit=unit)
    pruner.check()
    grain = {"macs": 4 * 36, "bytes": 20}[unit]
    assert pruner.cost(unit)[1] == pytest.approx(before, abs=2 * grain)
    assert any(not torch.equal(mask, masks[name]) for name, mask in pruner.masks().items())


def test_an_exchange_of_microseconds_is_refused():
    net = Net()
    layers = {name: LayerCost("4x1", 9.0, (0.5,), (5.0,)) for name in ("conv1", "conv2", "head")}
    shapes = {"machine": "m", "isa": "avx2", "threads": 1, "batch": 1, "inputs": (), "dtype": "float32"}
    costs = CostTable(**shapes, weights="float32", network=network_of(net), rest_us=1.0, layers=layers)
    pruner = pruner_of(net, pattern=BlockPattern(4, 1), costs=costs)
    pruner.prune_to(0.5)
    masks = pruner.masks()
    with pytest.raises(ValueError, match=r"microseconds of single units do not add up.*exchange macs"):
        pruner.exchange(0.3, unit="latency_us")
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks().items())
