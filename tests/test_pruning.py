"""Pruning: targets are exact, what is gone stays gone, and everything that hangs on a weight goes with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW

import sparsekd
from sparsekd import BlockPattern
from sparsekd.convert import SPARSE_TYPES
from sparsekd.nn import SparseConv2d, SparseLinear
from sparsekd.pruning import (
    Grouping,
    LinearSchedule,
    Pruner,
    choose_units,
    drop_blocks,
    lamp_scores,
    layer_ranks,
    magnitude_scores,
)

from .cases import through_files

GRANULARITIES = ("block", "filter", "unstructured")
OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


class Net(nn.Module):
    """Two convolutions, each into a batch norm, and a head. Channel counts are ragged under most patterns."""

    def __init__(self, first=10, second=21, head=3, bias=True):
        super().__init__()
        self.conv1 = nn.Conv2d(2, first, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, stride=2, bias=bias)
        self.bn2 = nn.BatchNorm2d(second)
        self.head = nn.Linear(second, head)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def batch(count=6):
    return torch.randn(count, 2, 6, 6), torch.randn(count, 3)


SMALL = BlockPattern(4, 3)


def pruner_of(net, granularity="block", pattern=SMALL, **options):
    options.setdefault("example_inputs", (torch.randn(2, 2, 6, 6),))
    return Pruner(net, granularity=granularity, pattern=pattern if granularity == "block" else None, **options)


def attached(kind="sgd", *args, **options):
    """A network, its pruner, and an optimizer that the pruner knows."""
    net = Net()
    pruner = pruner_of(net, *args, **options)
    optimizer = OPTIMIZERS[kind](net.parameters())
    pruner.attach(optimizer)
    return net, pruner, optimizer


def train_step(net, optimizer, x, y):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    optimizer.step()
    return loss


def dense_weights(net):
    """{name: the dense weight}, from whatever kind of layer: what the tests count independently of the pruner."""
    layers = {name: module for name, module in net.named_modules() if hasattr(module, "weight_shape")}
    dense = {name: layer.to_dense().weight.detach().clone() for name, layer in layers.items()}
    plain = {n: m for n, m in net.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    return dense | {name: layer.weight.detach().clone() for name, layer in plain.items()}


def nonzeros(net):
    return sum(int((weight != 0).sum()) for weight in dense_weights(net).values())


# Choosing


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_choice_is_exact_to_one_unit_and_takes_the_lowest(data):
    layers = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    # Few distinct scores: ties are the rule.
    scores = [torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))).double() for n in layers]
    sizes = [torch.tensor(data.draw(st.lists(st.integers(1, 16), min_size=n, max_size=n))) for n in layers]
    best = [int(score.argmax()) for score in scores]
    reachable = sum(int(size.sum() - size[i]) for size, i in zip(sizes, best, strict=True))
    remove = data.draw(st.floats(0, reachable))
    keep = choose_units(scores, sizes, remove)
    removed = sum(int(size[~kept].sum()) for size, kept in zip(sizes, keep, strict=True))
    assert abs(removed - remove) <= max(int(size.max()) for size in sizes) / 2
    assert all(bool(kept[i]) for kept, i in zip(keep, best, strict=True))
    gone = torch.cat([score[~kept] for score, kept in zip(scores, keep, strict=True)])
    others = [score[kept & (torch.arange(len(kept)) != i)] for score, kept, i in zip(scores, keep, best, strict=True)]
    if len(gone) and len(torch.cat(others)):
        assert gone.max() <= torch.cat(others).min()


def test_among_equals_the_later_unit_goes():
    keep = choose_units([torch.ones(3), torch.ones(3)], [torch.full((3,), 2), torch.full((3,), 2)], remove=6)
    assert [kept.tolist() for kept in keep] == [[True, True, False], [True, False, False]]


def test_a_choice_that_would_empty_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"at most 4 of 6 weights can go.*got 6 to remove"):
        choose_units([torch.arange(3.0)], [torch.full((3,), 2)], remove=6)


def test_scores_of_ragged_blocks_count_only_real_weights():
    weight = torch.full((5, 3), 2.0)
    layer = SparseLinear.from_dense(_linear(weight), BlockPattern(4, 2))
    assert layer.blocks.block_sizes().tolist() == [8, 4, 2, 1]
    assert magnitude_scores(layer).tolist() == [2.0, 2.0, 2.0, 2.0]


def _linear(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data.copy_(weight)
    return linear


def test_ranks_count_what_was_gone_before():
    ranks = layer_ranks(torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([2, 2, 2]), num_weights=8)
    assert ranks.tolist() == [7 / 8, 3 / 8, 5 / 8]


# Targets


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_every_target_is_hit_to_one_unit(granularity, scope, data):
    widths = data.draw(st.tuples(st.integers(2, 9), st.integers(2, 19)))
    net = Net(*widths)
    pattern = BlockPattern(data.draw(st.sampled_from([1, 4, 16])), data.draw(st.sampled_from([1, 3])))
    pruner = pruner_of(net, granularity, pattern, scope=scope, rewindable=False)
    original = nonzeros(net)
    assert pruner.num_weights == original == 9 * 2 * widths[0] + 9 * widths[0] * widths[1] + 3 * widths[1]
    largest = {"block": pattern.bh * pattern.bw, "filter": 9 * widths[0], "unstructured": 1}[granularity]
    for target in sorted(data.draw(st.lists(st.floats(0, 0.95), min_size=1, max_size=4))):
        try:
            pruner.prune_to(target)
        except ValueError as error:
            assert "one unit of each layer stays" in str(error)
            assert nonzeros(net) == pruner.num_kept  # and nothing has changed
            return
        pruner.check()
        assert nonzeros(net) == pruner.num_kept
        assert abs(original - pruner.num_kept - target * original) < largest
        assert pruner.removed_share == pytest.approx(1 - pruner.num_kept / original)
        assert all(bool(weight.any()) for weight in dense_weights(net).values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layer_scope_takes_the_same_share_from_every_layer(granularity):
    net = nn.Sequential(nn.Conv2d(2, 20, 3), nn.Conv2d(20, 40, 3), nn.Flatten(), nn.Linear(40, 30))
    with torch.no_grad():
        net[1].weight.mul_(0.01)  # under global scope this layer alone would pay
    pruner = pruner_of(net, granularity, BlockPattern(4, 1), scope="layer", example_inputs=None)
    for target in (0.3, 0.6):
        pruner.prune_to(target)
        for weight in dense_weights(net).values():
            assert float((weight == 0).double().mean()) == pytest.approx(target, abs=1 / 20)


def test_global_scope_takes_the_smallest_weights():
    net = nn.Sequential(nn.Conv2d(2, 20, 3), nn.Conv2d(20, 40, 3))
    with torch.no_grad():
        net[0].weight.sign_()
    pruner_of(net, "unstructured", example_inputs=None).prune_to(0.5)
    assert bool((net[0].weight != 0).all())
    kept = net[1].weight[net[1].weight != 0].abs()
    original = 2 * 20 * 9 + 20 * 40 * 9
    assert kept.numel() == original // 2 - 2 * 20 * 9


def test_lamp_scores_by_hand():
    scores = lamp_scores(torch.tensor([1.0, 3.0, 2.0]).double(), torch.tensor([1, 1, 2]))
    assert scores.tolist() == pytest.approx([1 / 18, 1.0, 4 / 17])
    assert lamp_scores(torch.zeros(3).double(), torch.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_lamp_does_not_see_the_scale_of_a_layer(granularity):
    kept = []
    for scale in (1.0, 2.0**-7):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 20, 3), nn.Conv2d(20, 40, 3))
        with torch.no_grad():
            net[1].weight.mul_(scale)
        pruner_of(net, granularity, score="lamp", example_inputs=None).prune_to(0.6)
        kept.append([weight != 0 for weight in dense_weights(net).values()])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))
    assert all(float(mask.double().mean()) > 0.05 for mask in kept[0])


def test_random_scores_are_a_control():
    shares = {}
    for score in ("magnitude", "random"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 20, 3), nn.Conv2d(20, 40, 3))
        total = sum(float(w.abs().sum()) for w in dense_weights(net).values())
        pruner_of(net, "unstructured", score=score, seed=1, example_inputs=None).prune_to(0.5)
        shares[score] = sum(float(w.abs().sum()) for w in dense_weights(net).values()) / total
    assert shares["random"] == pytest.approx(0.5, abs=0.05)
    assert shares["magnitude"] > 0.7


# Optimizers


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradient_and_optimizer_state_shrink_along(kind):
    layer = SparseConv2d(5, 9, 3, pattern=BlockPattern(4, 2))
    optimizers = [OPTIMIZERS[kind]([layer.values]), Adam([layer.values])]
    x = torch.randn(2, 5, 6, 6)
    for _ in range(2):
        layer(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    keep = torch.rand(len(layer.col_idx)) < 0.4
    values, grad = layer.values.detach().clone(), layer.values.grad.clone()
    before = [{k: v.clone() for k, v in o.state[layer.values].items() if v.dim()} for o in optimizers]
    assert all(before)
    parameter = layer.values
    drop_blocks(layer, keep, optimizers)
    assert layer.values is parameter
    assert torch.equal(layer.values, values[keep])
    assert torch.equal(layer.values.grad, grad[keep])
    for optimizer, tensors in zip(optimizers, before, strict=True):
        for key, tensor in tensors.items():
            assert torch.equal(optimizer.state[layer.values][key], tensor[keep]), key
    layer(x).sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_an_optimizer_whose_state_cannot_shrink_is_refused_before_anything_changes():
    layer = SparseLinear(8, 8, pattern=BlockPattern(4, 1))
    optimizer = torch.optim.Adafactor([layer.values])
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    with pytest.raises(TypeError, match=r"Adafactor does not have the parameter's shape.*use SGD"):
        drop_blocks(layer, torch.arange(16) < 8, [optimizer])
    assert layer.values.shape[0] == 16


def test_pruning_works_while_the_last_graph_is_alive():
    """Autograd remembers a parameter's shape as long as some loss holds on to its graph."""
    net, pruner, optimizer = attached()
    losses = [train_step(net, optimizer, *batch())]
    for target in (0.3, 0.6):
        pruner.prune_to(target)
        losses.append(train_step(net, optimizer, *batch()))


@pytest.mark.parametrize("granularity", ["block", "filter"])
def test_a_step_has_less_to_do(granularity):
    net = Net(16, 32, head=16)
    y = torch.randn(6, 16)
    pruner = pruner_of(net, granularity, BlockPattern(16, 1))
    optimizer = Adam(net.parameters())
    pruner.attach(optimizer)

    def work():
        train_step(net, optimizer, batch()[0], y)
        values = [layer.values for layer in net.modules() if isinstance(layer, SPARSE_TYPES)]
        moments = [optimizer.state[v][key] for v in values for key in ("exp_avg", "exp_avg_sq")]
        return sum(v.numel() for v in values), sum(v.grad.numel() for v in values), sum(m.numel() for m in moments)

    dense = work()
    pruner.prune_to(0.75)
    sparse = work()
    assert all(after / before == pytest.approx(0.25, abs=0.03) for before, after in zip(dense, sparse, strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_gone_stays_gone_after_every_step(granularity, kind):
    net, pruner, optimizer = attached(kind, granularity)
    for target in (0.0, 0.35, 0.7, 0.8):
        pruner.prune_to(target)
        kept = {name: weight != 0 for name, weight in dense_weights(net).items()}
        count = pruner.num_kept
        for _ in range(4):
            train_step(net, optimizer, *batch())
            pruner.after_step()
            pruner.check()
            assert pruner.num_kept == count
            for name, weight in dense_weights(net).items():
                assert not bool(weight[~kept[name]].any()), name


def test_check_notices_what_came_back():
    net, pruner, optimizer = attached("sgd", "unstructured")
    train_step(net, optimizer, *batch())
    pruner.prune_to(0.5)
    train_step(net, optimizer, *batch())  # no after_step: momentum brings weights back
    with pytest.raises(RuntimeError, match="has come back to life; call after_step"):
        pruner.check()


def test_the_padding_of_ragged_blocks_is_held_at_zero():
    net = Net()
    pruner = pruner_of(net)
    assert (net.conv2.values == 0).any()  # 10 x 21 channels in blocks of 4 x 3
    with torch.no_grad():
        net.conv2.values[net.conv2.values == 0] = 1.0
    with pytest.raises(RuntimeError, match="conv2 weight has come back to life"):
        pruner.check()
    pruner.after_step()
    pruner.check()
    round_trip = SparseConv2d.from_dense(net.conv2.to_dense(), SMALL)
    assert torch.equal(net.conv2.values, round_trip.values)


def test_check_notices_a_foreign_hand():
    net = Net()
    pruner = pruner_of(net)
    net.conv2.keep_(torch.arange(len(net.conv2.col_idx)) > 0)
    with pytest.raises(RuntimeError, match=r"layer 'conv2' keeps .* planned were"):
        pruner.check()


def test_check_notices_optimizer_state_of_the_old_shape():
    net, pruner, optimizer = attached("adam")
    train_step(net, optimizer, *batch())
    old = optimizer.state[net.conv2.values]["exp_avg"].clone()
    pruner.prune_to(0.5)
    pruner.check()
    optimizer.state[net.conv2.values]["exp_avg"] = old
    with pytest.raises(RuntimeError, match=r"layer 'conv2': .* the state 'exp_avg' of Adam"):
        pruner.check()


# Dead filters


def dead_channels(net, pruner, granularity):
    """Make filters 4..7 of conv1 (one row block of 4) the weakest and prune them away."""
    with torch.no_grad():
        if granularity == "unstructured":
            net.conv1.weight[4:8] *= 1e-6
        else:
            net.conv1.values[(net.conv1.blocks.row_block() * net.conv1.pattern.bh).div(4).long() == 1] *= 1e-6
    pruner.prune_to(0.2)
    dead = ~dense_weights(net)["conv1"].flatten(1).any(1)
    assert dead[4:8].all() and dead.sum() == 4
    return dead


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_batch_norm_and_bias_of_a_dead_filter_die_with_it(granularity, kind):
    net, pruner, optimizer = attached(kind, granularity, BlockPattern(4, 1))
    for _ in range(3):
        train_step(net, optimizer, *batch())
        pruner.after_step()
    with torch.no_grad():
        net.bn1.running_mean += 1  # statistics that would shine through
    dead = dead_channels(net, pruner, granularity)
    outputs = []
    net.bn1.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    for _ in range(20):
        train_step(net, optimizer, *batch())
        pruner.after_step()
        pruner.check()
    net.eval()
    net(batch()[0])
    assert len(outputs) == 21
    for output in outputs:
        assert not output[:, dead].any()
        assert output[:, ~dead].any()
    for parameter in (net.conv1.bias, net.bn1.weight, net.bn1.bias):
        assert not parameter[dead].any()
        assert parameter[~dead].all()
        assert not any(v[dead].any() for v in optimizer.state[parameter].values() if v.dim())
    assert pruner.num_dead_parameters >= 3 * 4  # conv2 may have dead filters too
    assert pruner.num_kept == nonzeros(net)


def test_a_batch_norm_without_weights_is_silent_too():
    net = Net()
    net.bn1 = nn.BatchNorm2d(10, affine=False)
    pruner = pruner_of(net, "filter")
    for _ in range(2):
        net(batch()[0])
    dead = dead_channels(net, pruner, "filter")
    net.eval()
    assert not net.bn1(net.conv1(batch()[0]))[:, dead].any()


def test_rewinding_does_not_raise_the_dead():
    net = Net()
    pruner = pruner_of(net, "filter")
    dead = dead_channels(net, pruner, "filter")
    pruner.rewind()
    pruner.check()
    assert not net.bn1.weight[dead].any() and net.bn1.weight[~dead].eq(1).all()
    assert not net.conv1.bias[dead].any() and net.conv1.bias[~dead].all()


def test_without_example_inputs_a_model_with_batch_norm_is_not_pruned():
    net = Net()
    pruner = pruner_of(net, example_inputs=None)
    with pytest.raises(ValueError, match=r"BatchNorm2d layers, which must die with .* observe\(x\)"):
        pruner.prune_to(0.1)
    assert pruner.num_kept == pruner.num_weights
    pruner.observe(torch.randn(2, 2, 6, 6))
    pruner.prune_to(0.1)


def test_filters_that_were_dead_before_are_buried_when_they_are_seen():
    mask = torch.ones(10, 1, 3, 3, dtype=torch.bool)
    mask[7] = False
    net = Net()
    net.conv1 = SparseConv2d.from_dense(net.conv1, BlockPattern(1, 2), mask=mask)
    pruner = pruner_of(net, "filter", example_inputs=None)
    assert net.conv1.bias[7] == 0 and net.bn1.weight[7] == 1
    pruner.observe(torch.randn(2, 2, 6, 6))
    assert net.bn1.weight[7] == 0 and net.bn1.weight.sum() == 9
    assert pruner.num_dead_parameters == 3


class Branches(nn.Module):
    """Batch norms that belong to a convolution and some that do not."""

    def __init__(self):
        super().__init__()
        self.conv_a, self.conv_b, self.conv_c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.own, self.shared, self.after_sum, self.of_input, self.mixed = (nn.BatchNorm2d(4) for _ in range(5))
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        a, b, c = self.conv_a(x), self.conv_b(self.dropout(x)), self.conv_c(x)
        y = self.own(a) + self.shared(a) + self.shared(b) + self.of_input(x) + self.mixed(a) + self.mixed(x)
        c += x
        return y + self.after_sum(c)


def test_a_batch_norm_belongs_to_what_alone_feeds_it():
    net = Branches()
    net.own.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pruner = Pruner(net, example_inputs=(torch.randn(2, 4, 3, 3),))
    assert pruner.state_dict()["batch_norms"] == {"own": ["conv_a"], "shared": ["conv_a", "conv_b"]}
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before if "conv" not in name)
    assert net.training and net.dropout.training and not net.own.training


# Rewinding


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rewinding_gives_the_survivors_their_first_values_bit_for_bit(granularity):
    net, pruner, optimizer = attached("adam", granularity)
    first = dense_weights(net)
    rest = {name: tensor.clone() for name, tensor in net.state_dict().items() if name.startswith(("bn", "head.b"))}
    for target in (0.3, 0.6):
        for _ in range(3):
            train_step(net, optimizer, *batch())
            pruner.after_step()
        pruner.prune_to(target)
        trained = dense_weights(net)
        pruner.rewind()
        for name, weight in dense_weights(net).items():
            assert torch.equal(weight, first[name] * (trained[name] != 0))
            assert not torch.equal(weight, trained[name])
        dead = {name: tensor for name, tensor in net.state_dict().items() if name in rest}
        assert all(torch.equal(dead[name][tensor != 0], rest[name][tensor != 0]) for name, tensor in dead.items())
        for parameter in net.parameters():
            assert not any(v.any() for v in optimizer.state[parameter].values())


def test_rewinding_only_the_weights_leaves_the_rest():
    net, pruner, optimizer = attached()
    first = dense_weights(net)
    for _ in range(3):
        train_step(net, optimizer, *batch())
    trained = {name: tensor.clone() for name, tensor in net.state_dict().items() if "bn" in name or "bias" in name}
    pruner.rewind(weights_only=True)
    assert all(torch.equal(weight, first[name]) for name, weight in dense_weights(net).items())
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in trained.items())


def test_late_rewinding_goes_back_to_the_snapshot():
    net, pruner, optimizer = attached()
    train_step(net, optimizer, *batch())
    pruner.snapshot()
    late = dense_weights(net)
    train_step(net, optimizer, *batch())
    pruner.prune_to(0.5)
    pruner.rewind()
    assert all(torch.equal(w, late[name] * (w != 0)) for name, w in dense_weights(net).items())
    with pytest.raises(RuntimeError, match="there is no theta0"):
        pruner_of(Net(), rewindable=False).rewind()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_after_a_reset_an_optimizer_steps_like_a_new_one(kind):
    net, pruner, optimizer = attached(kind)
    for _ in range(3):
        train_step(net, optimizer, *batch())
    pruner.rewind()
    x, y = batch()
    train_step(net, optimizer, x, y)
    stepped = dense_weights(net)
    pruner.rewind()
    train_step(net, OPTIMIZERS[kind](net.parameters()), x, y)
    assert all(torch.equal(weight, stepped[name]) for name, weight in dense_weights(net).items())


# State


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(granularity, score, model_first):
    batches = [batch() for _ in range(12)]

    def build():
        torch.manual_seed(3)
        net, pruner, optimizer = attached("adam", granularity, score=score, example_inputs=(batches[0][0],))
        return net, pruner, optimizer

    def run(net, pruner, optimizer, steps):
        for step in steps:
            train_step(net, optimizer, *batches[step])
            pruner.after_step()
            if step in (2, 5, 9):
                pruner.prune_to(0.08 * step)
            if step == 9:
                pruner.rewind()

    whole = build()
    run(*whole, range(12))
    first = build()
    run(*first, range(7))
    model_state, pruner_state = (through_files(part.state_dict()) for part in first[:2])
    optimizer_state = first[2].state_dict()
    net, pruner, optimizer = build()
    if model_first:
        net.load_state_dict(model_state)
    pruner.load_state_dict(pruner_state)
    net.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    pruner.check()
    run(net, pruner, optimizer, range(7, 12))
    expected = whole[0].state_dict()
    assert net.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in net.state_dict().items())
    assert pruner.num_kept == whole[1].num_kept < 0.3 * pruner.num_weights


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: pruner_of(Net(12)), "expected layers"),
        (lambda: pruner_of(Net(), pattern=BlockPattern(16, 1)), "expected layers"),
        (lambda: pruner_of(Net(), "unstructured"), "expected granularity unstructured, got block"),
        (lambda: pruner_of(Net(), scope="layer"), "expected scope layer, got global"),
    ],
)
def test_the_state_of_another_pruner_is_refused(other, says):
    pruner = pruner_of(Net())
    pruner.prune_to(0.5)
    other = other()
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(pruner.state_dict())
    assert other.num_kept == other.num_weights


def test_a_state_knows_which_batch_norm_dies_with_which_filter():
    saved = pruner_of(Net()).state_dict()
    pruner = pruner_of(Net(), example_inputs=None)
    pruner.load_state_dict(through_files(saved))
    assert pruner.observed
    pruner.prune_to(0.5)


def test_a_broken_or_earlier_state_is_refused():
    pruner = pruner_of(Net())
    early = pruner.state_dict()
    broken = {key: value for key, value in early.items() if key != "mask.head"}
    with pytest.raises(ValueError, match=r"expected mask.head of shape .* got nothing"):
        pruner.load_state_dict(broken)
    with pytest.raises(ValueError, match="another model or another Pruner"):
        pruner.load_state_dict({})
    pruner.prune_to(0.5)
    with pytest.raises(ValueError, match="no longer has all the blocks"):
        pruner.load_state_dict(early)


# Schedule


def test_the_schedule_is_linear_in_the_original_count():
    schedule = LinearSchedule(rate=0.05, every=75, final=0.6)
    removed = [schedule.removed_after(epoch) for epoch in (1, 74, 75, 149, 150, 825, 899, 900, 1200)]
    assert removed == pytest.approx([0, 0, 0.05, 0.05, 0.1, 0.55, 0.55, 0.6, 0.6])
    assert schedule.prunes == 12
    schedule.check_reaches(901)
    with pytest.raises(ValueError, match=r"12 prunes every 75 epochs reach 0.6 after epoch 900.*train 901 epochs"):
        schedule.check_reaches(900)
    assert LinearSchedule(0.1, 2, final=0.55, start=0.2).prunes == 4


@given(st.floats(0.01, 0.5), st.integers(1, 9), st.floats(0.01, 0.99))
def test_a_schedule_ends_exactly_at_its_last_prune(rate, every, final):
    schedule = LinearSchedule(rate, every, final)
    last = schedule.prunes * every
    assert schedule.removed_after(last - 1) < schedule.removed_after(last)
    assert schedule.removed_after(last) == schedule.removed_after(last + 10 * every) == final


@pytest.mark.parametrize(
    "arguments",
    [(0.0, 1, 0.5), (1.0, 1, 0.5), (0.1, 0, 0.5), (0.1, 1.5, 0.5), (0.1, 1, 1.0), (0.1, 1, 0.0), (0.1, 1, 0.5, 0.5)],
)
def test_a_schedule_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match=r"LinearSchedule: (rate|every|final|start) must"):
        LinearSchedule(*arguments)


def test_rounding_adds_no_prune():
    final = 1 - 0.7  # a little over 0.3
    schedule = LinearSchedule(rate=final / 3, every=2, final=final)
    assert schedule.prunes == 3
    assert schedule.removed_after(6) == schedule.removed_after(8) == final


# Bad input


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
        ({"exclude": ["*"]}, "no Linear or Conv2d layer to prune"),
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
    pruner = pruner_of(Net())
    assert str(pruner) == "Pruner(block 4x3, global magnitude: 0.0% of 2133 weights in 3 layers removed)"
    assert pruner.makes_faster and not pruner_of(Net(), "unstructured").makes_faster


# ---- Groupings: what the kernels of a GPU like


def grouped(grouping, share):
    """The block mask ``[8, 8, 3, 3]`` of a 32 -> 32 convolution pruned under a grouping, in two steps."""
    conv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    pruner = Pruner(conv, pattern=BlockPattern(4, 4), grouping=grouping)
    for part in (share / 2, share):
        pruner.prune_to(part)
    pruner.check()
    return conv[0].block_mask(), pruner


def test_groups_of_rows_share_their_columns():
    mask, pruner = grouped(Grouping(rows=16), 0.6)
    together = mask.view(2, 4, 8, 3, 3)
    assert (together == together[:, :1]).all() and not torch.equal(mask[0], mask[4])
    assert pruner.removed_share == pytest.approx(0.6, abs=0.01)


def test_square_groups_and_whole_taps():
    mask, _ = grouped(Grouping(rows=8, cols=16, taps=True), 0.5)
    together = mask.view(4, 2, 2, 4, 9)
    assert (together == together[:, :1, :, :1, :1]).all() and 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("rows", [0, 8])
def test_equal_rows_keep_their_strongest_columns(rows):
    torch.manual_seed(1)
    conv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    with torch.no_grad():
        conv[0].weight[:16] *= 10  # without `equal`, all would go from the other half
    pruner = Pruner(conv, pattern=BlockPattern(4, 4), grouping=Grouping(rows=rows, equal=True))
    before = conv[0].blocks
    pruner.prune_to(0.7)
    mask, tall = conv[0].block_mask(), max(rows // 4, 1)
    assert mask.flatten(1).sum(1).unique().numel() == 1
    norms = torch.zeros(8, 72).index_put((before.row_block(), before.col_idx.long()), energy(before))
    of_group = norms.view(8 // tall, tall, 72).sum(1)
    kept = mask.permute(0, 2, 3, 1).reshape(8 // tall, tall, 72)[:, 0]
    count = int(kept[0].sum())
    assert torch.equal(kept, of_group.argsort(1, descending=True).argsort(1) < count)


def energy(blocks):
    return blocks.values.square().sum((1, 2))


def test_a_student_pruned_for_a_gpu_runs_on_a_cpu_and_in_its_blocks():
    grouping = Grouping.for_device("cuda")
    net = nn.Sequential(nn.Conv2d(64, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 40, 1))
    pruner = Pruner(net, pattern=BlockPattern.for_device("cuda"), grouping=grouping)
    pruner.prune_to(0.5)
    first = net[0].blocks
    sets = first.mask().view(2, -1, *first.mask().shape[1:])  # two groups of 256 channels
    assert (sets == sets[:, :1]).all() and len(set(first.mask().flatten(1).sum(1).tolist())) == 1
    x = torch.randn(2, 64, 5, 5)
    want = nn.functional.conv2d(x, first.to_dense(), net[0].bias, padding=1)
    torch.testing.assert_close(net[0](x), want, rtol=1e-4, atol=1e-4)
    fine = first.repack(BlockPattern(16, 1))
    fine.validate()
    layer = SparseConv2d.from_dense(net[0].to_dense(), BlockPattern(16, 1), mask=fine.mask())
    assert layer.num_kept == net[0].num_kept
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(fine.to_dense(), first.to_dense())
    with pytest.raises(ValueError, match="blocks of 16x3 must divide those of 64x32"):
        first.repack(BlockPattern(16, 3))


def test_a_grouping_is_part_of_a_pruners_state():
    _, pruner = grouped(Grouping(rows=16), 0.5)
    _, other = grouped(Grouping(rows=8), 0.0)
    with pytest.raises(ValueError, match=r"expected layers .*grouping"):
        other.load_state_dict(pruner.state_dict())
    _, same = grouped(Grouping(rows=16), 0.0)
    same.load_state_dict(pruner.state_dict())
    assert same.num_kept == pruner.num_kept


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Grouping(rows=-1), "rows must be channels"),
        (lambda: grouped(Grouping(rows=18), 0.5), "rows must be a multiple of the block's 4 channels, got 18"),
        (lambda: Pruner(Net(), granularity="filter", grouping=Grouping(rows=16)), "belongs to granularity 'block'"),
    ],
)
def test_groupings_that_fit_nothing_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
