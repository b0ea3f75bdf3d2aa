"""Networks whose layers read what they also add, exported: no layer may write over what it still reads."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd
from sparsekd.backends import cpu

from ..freeze.networks import ALL_DENSE, ALL_SPARSE, quick
from .files import write

pytestmark = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)

THREADS = (1, 2, 4)
WIDTH = 64  # a layer of one number at a time would not show what it writes over
LAYERS = {
    "1x1": (lambda: nn.Conv2d(WIDTH, WIDTH, 1), (WIDTH, 12, 12)),
    "3x3": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1), (WIDTH, 12, 12)),
    "depthwise": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), (WIDTH, 12, 12)),
    "grouped": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2), (WIDTH, 12, 12)),
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), (WIDTH,)),
    "rows": (lambda: nn.Linear(WIDTH, WIDTH), (20, WIDTH)),
    "conv1d": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), (WIDTH, 40)),
}


class Around(nn.Module):
    """act(layer(y) + y) of a y that was computed, and another one around the first."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.second, self.third = layer(), layer(), layer()

    def forward(self, x):
        y = self.first(x)
        y = F.relu(self.second(y) + y)
        return self.third(y) + y


def check(path, model, x, tolerance, threads=THREADS):
    """Sessions of so many threads beside the model."""
    for batch in (1, 3):
        given = x[torch.arange(batch) % x.shape[0]]
        with torch.no_grad():
            want = model(given).float()
        for count in threads:
            got = torch.from_numpy(sparsekd.runtime.Session(path, threads=count)(given.numpy()))
            worst = float((got - want).abs().max() / want.abs().max())
            assert worst < tolerance, (count, batch, worst)


@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_residual_around_one_layer(kind, memory_format, dtype, tmp_path):
    layer, sizes = LAYERS[kind]
    torch.manual_seed(0)
    model, x = Around(layer).eval(), torch.randn(2, *sizes)
    sparsekd.sparsify(model, density=0.5)
    for gain in (ALL_SPARSE, ALL_DENSE):
        frozen = quick(model, x, memory_format=memory_format, dtype=dtype, min_gain=gain)
        frozen.export(tmp_path / f"{gain}.skd")
        check(tmp_path / f"{gain}.skd", model, x, 1e-5 if dtype is None else 0.05)


def test_attention_and_its_two_residuals(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed, self.out, self.wide = (nn.Linear(WIDTH, n) for n in (3 * WIDTH, WIDTH, WIDTH))

        def forward(self, x):
            x = self.wide(x)
            q, k, v = self.mixed(x).chunk(3, -1)
            x = self.out(F.scaled_dot_product_attention(q, k, v)) + x
            return F.gelu(self.wide(x) + x)

    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 16, WIDTH)
    quick(model, x).export(tmp_path / "block.skd")
    check(tmp_path / "block.skd", model, x, 1e-5)


# Graphs by hand: the second operand is a view of the first, which shares its memory under another number.


def around_a_view(view: list[int]) -> dict:
    """abs(x), a linear layer over it read as ``view``, whose residual is abs(x) read the same way once more, and neg,
    since what a file returns is not in the buffer."""
    shapes = [[-1, 4, 64], [-1, 4, 64], view, view, view, view]
    attributes = {"weight": "weight", "outputs": 64, "activation": "none"}
    nodes = [("abs", [0], 1, {}), ("reshape", [1], 2, {}), ("reshape", [1], 3, {}), ("linear", [2, 3], 4, attributes)]
    nodes.append(("neg", [4], 5, {}))
    return {
        "format": "sparsekd-network",
        "version": 1,
        "values": [{"shape": shape, "dtype": "float32"} for shape in shapes],
        "inputs": [{"name": "x", "value": 0}],
        "outputs": [{"name": "y", "value": 5}],
        "nodes": [
            {"op": op, "name": op, "inputs": given, "outputs": [made], "attributes": more}
            for op, given, made, more in nodes
        ],
        "plan": {"memory_format": "contiguous", "images": 0, "threads": 1, "isa": ""},
    }


@pytest.mark.parametrize("view", [[-1, 4, 64], [-1, 2, 2, 64], [-4, 64]])
@pytest.mark.parametrize("threads", THREADS)
def test_a_residual_that_is_a_view_of_what_the_layer_reads(view, threads, tmp_path):
    torch.manual_seed(0)
    weight, x = torch.randn(64, 64), torch.randn(5, 4, 64)
    path = write(tmp_path / "view.skd", around_a_view(view), {"weight": weight})
    y = x.abs().reshape([-size * 5 if size < 0 else size for size in view])
    got = sparsekd.runtime.Session(path, threads=threads)(x.numpy())
    torch.testing.assert_close(torch.from_numpy(got), -(y @ weight.T + y), rtol=1e-4, atol=1e-4)


# ---- Random graphs


class Random(nn.Module):
    """A graph of layers, sums, products, views, slices and concats, each of what was made before; every second reads
    the newest twice."""

    def __init__(self, seed, maps):
        super().__init__()
        self.maps, dice = maps, random.Random(seed)
        self.layers, self.steps = nn.ModuleList(), []
        for i in range(dice.randint(4, 9)):
            newest, other = i, dice.choice([i, i, dice.randint(0, i)])
            what = dice.choice(["around", "around", "around", "sum", "product", "joined", "turned", "act", "squashed"])
            self.layers.append(self._layer(dice) if what in ("around", "joined") else nn.Identity())
            self.steps.append((what, newest, other, dice.choice([F.relu, F.silu, torch.tanh, lambda y: y])))

    def _layer(self, dice):
        if not self.maps:
            return nn.Linear(32, 32)
        kernel = dice.choice([1, 3])
        return nn.Conv2d(32, 32, kernel, padding=kernel // 2, groups=dice.choice([1, 1, 32]))

    def forward(self, x):
        made = [x]
        for layer, (what, newest, other, act) in zip(self.layers, self.steps, strict=True):
            a, b = made[newest], made[other]
            if what == "around":
                y = act(layer(a) + b)
            elif what == "joined":
                y = layer(torch.cat([a[:, :16], b[:, 16:]], 1))
            elif what == "turned":
                y = act(a + b.flatten(1).reshape(b.shape))
            elif what == "squashed":
                y = a * torch.sigmoid(b.mean((2, 3), keepdim=True) if self.maps else b.mean(-1, keepdim=True))
            elif what == "act":
                y = act(a)
            else:
                y = a + b if what == "sum" else torch.tanh(a) * torch.sigmoid(b)
            made.append(y / 2)
        return made[-1], made[-2] + made[-1]


@pytest.mark.parametrize("seed", range(16))
def test_random_graphs(seed, tmp_path):
    torch.manual_seed(seed)
    maps = seed % 2 == 0
    model = Random(seed, maps).eval()
    x = torch.randn(3, 32, 9, 9) if maps else torch.randn(3, 32)
    frozen = quick(model, x, memory_format="channels_last" if seed % 4 else "contiguous", layer_ms=0.1)
    frozen.export(tmp_path / "random.skd")
    with torch.no_grad():
        wanted = model(x)
    for y, want in zip(frozen(x), wanted, strict=True):
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    for threads in (1, 2):
        got = sparsekd.runtime.Session(tmp_path / "random.skd", threads=threads)._run([x.numpy()])
        for y, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(y, want.numpy(), rtol=1e-4, atol=1e-5)
