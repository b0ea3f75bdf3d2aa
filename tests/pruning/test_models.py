"""What people's models hold: every kind of layer, shared layers and weights, odd names, copies that average."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from sparsekd import BlockPattern
from sparsekd.nn import SparseConv1d, SparseConv3d, SparseConvTranspose2d
from sparsekd.pruning import Pruner


class Kinds(nn.Module):
    """A layer of each kind, each into a batch norm."""

    def __init__(self):
        super().__init__()
        self.line, self.norm1 = nn.Conv1d(4, 24, 3), nn.BatchNorm1d(24)
        self.up, self.norm2 = nn.ConvTranspose2d(24, 18, 3, stride=2), nn.BatchNorm2d(18)
        self.point, self.norm3 = nn.Conv3d(18, 20, 1), nn.BatchNorm3d(20)

    def forward(self, x):
        x = torch.relu(self.norm1(self.line(x))).unsqueeze(2)
        x = torch.relu(self.norm2(self.up(x))).unsqueeze(2)
        return self.norm3(self.point(x))


@pytest.mark.parametrize("granularity", ["block", "filter", "unstructured"])
def test_every_kind_of_layer_is_pruned_and_dies_with_its_batch_norm(granularity):
    torch.manual_seed(0)
    net, x = Kinds(), torch.randn(3, 4, 7)
    with torch.no_grad():
        for layer in (net.line, net.point):
            layer.weight[:8] *= 1e-6
        net.up.weight[:, :6] *= 1e-6  # [inputs, outputs, R, S]
        for norm in (net.norm1, net.norm2, net.norm3):
            norm.bias.fill_(0.7)
    pattern = BlockPattern(4, 3) if granularity == "block" else None
    pruner = Pruner(net, granularity=granularity, pattern=pattern, example_inputs=(x,))
    kinds = (SparseConv1d, SparseConvTranspose2d, SparseConv3d)
    assert [isinstance(layer, kinds) for layer in (net.line, net.up, net.point)] == {
        "block": [True] * 3,
        "filter": [True, False, True],
        "unstructured": [False] * 3,
    }[granularity]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    pruner.attach(optimizer)
    pruner.prune_to(240 / 648 if granularity == "filter" else 1536 / 4536)  # the small weights
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        pruner.after_step()
    pruner.check()
    net.eval()
    shapes = {"line": (3, 4, 7), "up": (3, 24, 1, 5), "point": (3, 18, 1, 4, 4)}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        layer, norm = getattr(net, name), getattr(net, f"norm{number}")
        output = norm(layer(torch.randn(shape))).transpose(0, 1).flatten(1)
        dead = 6 if name == "up" and granularity != "filter" else 8 if name != "up" else 0
        assert int((output == 0).all(1).sum()) == dead


def test_weights_that_layers_share_are_left_alone_or_refused():
    def tied():
        net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 8))
        net[2].weight = net[0].weight
        return net

    for granularity in ("block", "filter", "unstructured"):
        net = tied()
        with pytest.warns(UserWarning, match="0: shares a weight with 2"):
            pruner = Pruner(net, granularity=granularity)
        pruner.prune_to(0.5)
        assert list(pruner.layers()) == ["3"]
        assert bool((net[0].weight != 0).all())
        with pytest.raises(ValueError, match="share one weight"):
            Pruner(tied(), granularity=granularity, include=["0", "3"])


def test_computed_weights_are_left_alone():
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    prune.l1_unstructured(net[0], "weight", 0.5)
    for granularity in ("unstructured", "block"):
        with pytest.warns(UserWarning, match="0: Linear whose weight is computed"):
            assert list(Pruner(net, granularity=granularity).layers()) == ["1"]


@pytest.mark.parametrize("granularity", ["block", "filter", "unstructured"])
def test_names_with_brackets_and_stars(granularity):
    def net():
        return nn.ModuleDict({"price[usd]": nn.Linear(16, 16), "a*": nn.Linear(16, 16), "ab?": nn.Linear(16, 16)})

    assert len(Pruner(net(), granularity=granularity).layers()) == 3
    assert list(Pruner(net(), granularity=granularity, include=["a*"]).layers()) == ["a*"]
    assert list(Pruner(net(), granularity=granularity, include=["*"], exclude=["price[usd]"]).layers()) == ["a*", "ab?"]


@pytest.mark.parametrize("granularity", ["block", "unstructured"])
def test_a_layer_under_two_names_is_pruned_once_and_rewound(granularity):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)
            self.b, self.c = self.a, nn.Linear(32, 8)

        def forward(self, x):
            return self.c(self.b(torch.relu(self.a(x))))

    net, x = Net(), torch.randn(4, 32)
    pruner = Pruner(net, granularity=granularity)
    assert list(pruner.layers()) == ["a", "c"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner.attach(optimizer)
    pruner.prune_to(0.5)
    assert net.a is net.b
    want = net(x)
    want.square().sum().backward()
    optimizer.step()
    pruner.after_step()
    assert not torch.equal(net(x), want)
    pruner.rewind()
    assert torch.equal(net(x), want)
    again = Pruner(Net(), granularity=granularity)
    again.load_state_dict(pruner.state_dict())
    assert again.num_kept == pruner.num_kept


@pytest.mark.parametrize("granularity", ["block", "filter", "unstructured"])
def test_an_average_of_the_weights_follows_the_pruner(granularity):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)), torch.randn(4, 32)
    pruner = Pruner(net, granularity=granularity)
    average = AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    pruner.attach(average)
    pruner.attach(average)  # once is enough, twice does no harm
    other = copy.deepcopy(net)  # one that nobody attached keeps its blocks
    average.update_parameters(net)  # the first takes the values as they are
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.mul_(3)
    before = average.module[0].weight.detach().clone()
    pruner.prune_to(0.5)
    kept = net[0].weight != 0
    assert torch.equal(average.module[0].weight.detach(), before * kept)
    average.update_parameters(net)
    torch.testing.assert_close(average.module[0].weight, before * kept / 2 + net[0].weight / 2)
    pruner.grow_to(0.25)
    average.update_parameters(net)
    assert average(x).shape == (4, 8)
    assert int((other[0].weight != 0).sum()) == 32 * 48


def test_a_copy_with_other_blocks_is_refused():
    net = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 8))
    dense = copy.deepcopy(net)
    pruner = Pruner(net)
    with pytest.raises(ValueError, match=r"layer '0' of the copy does not have the blocks .* make the copy after"):
        pruner.attach(dense)
    with pytest.raises(ValueError, match="the copy has no 1"):
        pruner.attach(copy.deepcopy(net)[:1])
    late = copy.deepcopy(net)
    pruner.prune_to(0.5)
    with pytest.raises(ValueError, match="does not have the blocks"):
        pruner.attach(late)
