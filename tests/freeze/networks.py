"""Models that the tests freeze, and how."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.backends import cpu
from sparsekd.freeze import FrozenModel, freeze, measure
from sparsekd.freeze.layer import FrozenLayer
from sparsekd.models import BasicBlock
from sparsekd.nn import SparseConv2d

ALL_SPARSE, ALL_DENSE = 0.0, math.inf  # values of min_gain


def quick(model, inputs, **options) -> FrozenModel:
    return freeze(model, inputs, **{"layer_ms": 1.0, "min_gain": ALL_SPARSE, **options})


def trained(model: nn.Module) -> nn.Module:
    """BatchNorms as training leaves them, so that a wrong fold shows."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model


def wrong_in_threads(call, batches, turns: int, torch_threads: int | None = None) -> list[int]:
    """Which batches gave other bits when three threads called at once; `torch_threads` is set in each of them."""
    want, wrong = [call(x) for x in batches], []

    def work(first: int) -> None:
        if torch_threads:
            torch.set_num_threads(torch_threads)
        for turn in range(turns):
            which = (first + turn) % len(batches)
            if not torch.equal(call(batches[which]), want[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


class ResNet(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, 7)

    def forward(self, x):
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class PreActivation(nn.Module):
    """The block of wide residual networks: relu(bn(x)) feeds both branches."""

    def __init__(self, c: int, k: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, k, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(k), nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c, k, 1, stride, bias=False)

    def forward(self, x):
        seen = F.relu(self.bn1(x), inplace=True)
        shortcut = self.shortcut(seen)
        y = self.conv2(F.relu(self.bn2(self.conv1(seen)), inplace=True))
        y += shortcut
        return y


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1, depthwise 3x3, linear 1x1."""

    def __init__(self, c: int, wide: int):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(wide, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        return x + self.project(self.depthwise(self.expand(x)))


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 3))


class Custom(nn.Module):
    """A convolution, a BatchNorm and a forward given by the test."""

    def __init__(self, forward, channels: int = 16):
        super().__init__()
        self.conv, self.bn = SparseConv2d(channels, channels, 3, padding=1, density=0.5), nn.BatchNorm2d(channels)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def ours_throughout(monkeypatch) -> None:
    """Every layer that can be is measured to be faster by our kernels."""
    real = measure.measure

    def biased(timed, seconds):
        samples = real(timed, seconds)
        return {name: [us * (1e6 if name == "dense" else 1.0) for us in values] for name, values in samples.items()}

    monkeypatch.setattr(measure, "measure", biased)


def assert_frozen_equals(model: nn.Module, frozen: FrozenModel, *inputs) -> None:
    model.eval()
    with torch.no_grad():
        want = model(*(x.clone() for x in inputs))
    torch.testing.assert_close(frozen(*inputs), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


IMAGE = (2, 3, 12, 12)
MODELS = {
    "resnet": (ResNet, IMAGE),
    "plain": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 33, 3)), IMAGE),
    "preactivation": (lambda: nn.Sequential(PreActivation(16, 32, 2), PreActivation(32, 32, 1)), (2, 16, 9, 9)),
    "mobilenet": (lambda: InvertedResidual(16, 48), (2, 16, 7, 7)),
    "mlp": (Mlp, (4, 20)),
}


needs_kernels = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
gains = pytest.mark.parametrize(
    "min_gain", [pytest.param(ALL_SPARSE, id="sparse", marks=needs_kernels), pytest.param(ALL_DENSE, id="dense")]
)


def calls(frozen: FrozenModel) -> list[str]:
    """What the frozen graph does, in order: "frozen", or the name of the module class, function or method."""
    kinds = []
    for node in frozen.network.graph.nodes:
        if node.op == "call_module":
            module = frozen.network.get_submodule(node.target)
            kinds.append("frozen" if isinstance(module, FrozenLayer) else type(module).__name__)
        elif node.op in ("call_function", "call_method"):
            kinds.append(getattr(node.target, "__name__", node.target))
    return kinds
