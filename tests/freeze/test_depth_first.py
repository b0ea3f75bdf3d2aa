"""Neighbouring layers by rows give the bits that they give one after the other, in a process and from a file."""

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.backends import cpu
from sparsekd.freeze.chain import Chain, find_chains
from sparsekd.freeze.layer import FrozenLayer

from ..cases import torch_threads
from .networks import ALL_SPARSE, ours_throughout, trained

pytestmark = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)


def layer(c: int, k: int, kernel: int = 1, stride: int = 1, groups: int = 1, dilation: int = 1, act=nn.ReLU6):
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(c, k, kernel, stride, padding, dilation, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(k), act())


class Block(nn.Module):
    """Expand, depthwise, project; an input may be added."""

    def __init__(self, c: int, wide: int, k: int, kernel: int = 3, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.expand = layer(c, wide)
        self.depthwise = layer(wide, wide, kernel, stride, groups=wide, dilation=dilation)
        self.project = layer(wide, k, act=nn.Identity)
        self.adds = stride == 1 and c == k

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


def tall(c: int, kernel: int, padding: int, stride: int = 1, groups: int = 1):
    """Padded in height alone."""
    conv = nn.Conv2d(c, c, (kernel, 1), stride, (padding, 0), groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU())


class SeenTwice(nn.Module):
    """What the expanding layer makes is read again outside."""

    def __init__(self):
        super().__init__()
        self.expand, self.depthwise = layer(16, 96), layer(96, 96, 3, groups=96)

    def forward(self, x):
        y = self.expand(x)
        return self.depthwise(y), y


# The network, its input's channels and size, and how many layers go by rows together.
NETWORKS = {
    "residual": (lambda: Block(16, 96, 16), 16, (28, 28), [3]),
    "stride": (lambda: Block(16, 96, 24, stride=2), 16, (56, 56), [3]),
    "odd size": (lambda: Block(20, 100, 33, stride=2), 20, (41, 29), [3]),
    "kernel of 5, dilated": (lambda: Block(16, 96, 16, kernel=5, dilation=2), 16, (64, 31), [3]),
    "two residuals": (lambda: nn.Sequential(Block(16, 96, 16), Block(16, 96, 16)), 16, (28, 28), [3, 3]),
    "two blocks": (lambda: nn.Sequential(Block(16, 96, 16), Block(16, 96, 24, stride=2)), 16, (56, 56), [6]),
    "a chain": (lambda: nn.Sequential(Block(16, 96, 24, stride=2), layer(24, 96), layer(96, 32)), 16, (56, 56), [5]),
    "stride beyond the kernel": (
        lambda: nn.Sequential(layer(16, 96), layer(96, 96, stride=3), layer(96, 32)), 16, (64, 64), [3],
    ),
    "tall kernel": (lambda: nn.Sequential(layer(16, 96), tall(96, 3, 1, 1, 96), layer(96, 16)), 16, (31, 40), [3]),
    "tall kernel, stride": (
        lambda: nn.Sequential(layer(16, 96), tall(96, 5, 2, 2, 96), layer(96, 16)), 16, (41, 40), [3],
    ),
    "much padding": (lambda: nn.Sequential(layer(16, 96), tall(96, 3, 3, 1, 96), layer(96, 16)), 16, (31, 40), []),
    "padded 1x1": (lambda: nn.Sequential(layer(16, 96), tall(96, 1, 1), layer(96, 16)), 16, (31, 40), []),
    "padded 1x1, stride": (lambda: nn.Sequential(layer(16, 96), tall(96, 1, 1, 2), layer(96, 16)), 16, (31, 40), []),
    "few rows": (lambda: nn.Sequential(layer(16, 96), layer(96, 96), layer(96, 16)), 16, (4, 200), [3]),
    "one row": (lambda: nn.Sequential(layer(16, 96), layer(96, 96), layer(96, 16)), 16, (1, 2000), []),
    "seen twice": (SeenTwice, 16, (32, 32), []),
    "small": (lambda: Block(16, 32, 16), 16, (12, 12), []),
    "narrow": (lambda: Block(16, 96, 16), 16, (224, 7), []),
    "full convolution": (lambda: nn.Sequential(layer(16, 96), layer(96, 96, 3), layer(96, 16)), 16, (32, 32), []),
}  # fmt: skip


def frozen_network(name, monkeypatch):
    build, channels, size, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = sparsekd.sparsify(trained(build()), density=0.5)
    ours_throughout(monkeypatch)
    x = torch.randn(1, channels, *size)
    return sparsekd.freeze(model, x, memory_format="channels_last", min_gain=ALL_SPARSE, layer_ms=1.0), x


def only_chain(frozen) -> Chain:
    layers = {name: one for name, one in frozen.network.named_modules() if isinstance(one, FrozenLayer)}
    (links,) = find_chains(frozen.network.graph, layers)
    return Chain(links, 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_give_the_same_bits(name, monkeypatch):
    frozen, x = frozen_network(name, monkeypatch)
    chain = only_chain(frozen)
    assert chain._build([False]).chain_lengths == NETWORKS[name][3]
    for batch in (1, 2, 3, 5):
        given = torch.randn(batch, *x.shape[1:]).contiguous(memory_format=torch.channels_last)
        with torch_threads(1):
            want = chain._one_by_one(given.clone())
        for threads in (1, 2, 3, 5):
            with torch_threads(threads):
                got = chain.run(given)
            for one, other in zip(*[(y,) if isinstance(y, torch.Tensor) else y for y in (got, want)], strict=True):
                assert torch.equal(one, other), (batch, threads)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_gives_the_same_bits(name, monkeypatch, tmp_path):
    frozen, x = frozen_network(name, monkeypatch)
    frozen.export(tmp_path / "student.skd")
    for threads in (1, 2, 3):
        session = sparsekd.runtime.Session(tmp_path / "student.skd", threads=threads)
        for batch in (1, 3):
            given = torch.randn(batch, *x.shape[1:])
            want, got = frozen(given), session(given.numpy())
            if isinstance(want, torch.Tensor):
                want, got = (want,), (got,)
            for one, other in zip(got, want, strict=True):
                assert torch.equal(torch.from_numpy(one), other), (batch, threads)


def test_rows_in_bfloat16(monkeypatch):
    torch.manual_seed(0)
    model = trained(nn.Sequential(layer(16, 96), layer(96, 96, stride=2), layer(96, 33))).bfloat16()
    sparsekd.sparsify(model, density=0.5)
    ours_throughout(monkeypatch)
    x = torch.randn(3, 16, 57, 57).bfloat16().contiguous(memory_format=torch.channels_last)
    frozen = sparsekd.freeze(model, x, memory_format="channels_last", min_gain=ALL_SPARSE, layer_ms=1.0)
    chain = only_chain(frozen)
    assert chain._build([False]).chain_lengths == [3]
    for threads in (1, 2):
        with torch_threads(threads):
            assert torch.equal(chain.run(x), chain._one_by_one(x))
