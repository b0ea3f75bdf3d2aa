"""A small network, its pruner and optimizer, and what the tests count independently of the pruner."""

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from sparsekd import BlockPattern
from sparsekd.pruning import (
    Pruner,
)

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


def student():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 4, padding=1)),
        *(nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


IMAGE = torch.randn(2, 3, 16, 16)
WORK = {"0": 256 * 3 * 16 * 9, "3": 16 * 16 * 32 * 9, "8": 320}
