"""What is gone stays gone: optimizer state shrinks along, and filters take what hangs on them with them."""

import pytest
import torch
from torch import nn
from torch.optim import Adam

from sparsekd import BlockPattern
from sparsekd.convert import SPARSE_TYPES
from sparsekd.nn import SparseConv2d, SparseLinear
from sparsekd.pruning import (
    Pruner,
    drop_blocks,
)

from .common import (
    GRANULARITIES,
    OPTIMIZERS,
    SMALL,
    Net,
    attached,
    batch,
    dead_channels,
    dense_weights,
    nonzeros,
    pruner_of,
    train_step,
)


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
