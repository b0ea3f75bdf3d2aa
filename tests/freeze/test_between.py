"""What stands between layers (gates, concatenations, layer norms) is found, computed as torch does, ends no chain."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd
from sparsekd.backends import cpu
from sparsekd.freeze.between import Between, between_geometry, between_operands
from sparsekd.freeze.chain import alone
from sparsekd.freeze.packed import cpu_layer

from ..cases import torch_threads
from ..test_isa import KNOWN_ISAS, isa_restored  # noqa: F401
from .networks import assert_frozen_equals, quick, trained
from .test_chain import chains_of, ours_wins  # noqa: F401

needs_kernels = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)


@pytest.fixture(autouse=True)
def _threads():
    with torch_threads(2):
        yield


class Gate(nn.Module):
    """Squeeze and excitation: pooling, two 1x1 layers, a product."""

    def __init__(self, channels, squeezed=8, gate=nn.Sigmoid):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x):
        return x * self.gate(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class MobileBlock(nn.Module):
    def __init__(self, activation=nn.Hardswish, gate=nn.Hardsigmoid):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), activation())
        self.depthwise = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), activation()
        )
        self.se = Gate(32, gate=gate)
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x):
        return x + self.project(self.se(self.depthwise(self.expand(x))))


class SEBottleneck(nn.Module):
    """The gate's product, the shortcut and the ReLU are one call."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.se = Gate(16)

    def forward(self, x):
        x = F.relu(self.one(x))
        return F.relu(self.se(self.two(x)) + x)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(16, 16, 1)
        self.branches = nn.ModuleList([nn.Conv2d(16, 16, 1), nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(16, 20, 1)])
        self.head = nn.Conv2d(68, 16, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([branch(x) for branch in self.branches], 1))


class FeedForward(nn.Module):
    """Half of an encoder layer, the norm behind it."""

    def __init__(self, functional=False):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(48, 96), nn.Linear(96, 48), nn.LayerNorm(48)
        self.last, self.functional = nn.Linear(48, 16), functional
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        x = self.two(F.gelu(self.one(x))) + x
        x = F.layer_norm(x, (48,), self.norm.weight, self.norm.bias, 1e-5) if self.functional else self.norm(x)
        return self.last(x)


MODELS = {
    "mobile": (MobileBlock, (2, 16, 7, 9), 1, "gate"),
    "mobile silu": (lambda: MobileBlock(nn.SiLU, nn.Sigmoid), (2, 16, 7, 9), 1, "gate"),
    "se": (SEBottleneck, (2, 16, 6, 6), 1, "gate"),
    "inception": (Inception, (2, 16, 6, 6), 1, "cat"),
    "feed forward": (FeedForward, (2, 5, 48), 1, "layer_norm"),
    "feed forward, functional": (lambda: FeedForward(True), (2, 5, 48), 1, "layer_norm"),
}


@needs_kernels
@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_chain_goes_on_and_a_file_keeps_it(name, dtype, ours_wins, tmp_path):  # noqa: F811
    build, shape, chains, kind = MODELS[name]
    model = sparsekd.sparsify(trained(build()).eval(), density=0.5)
    x = torch.randn(shape)
    frozen = quick(model, x, dtype=dtype, memory_format="channels_last", tolerance=0.1 if dtype else None)
    assert kind in [one.geometry.kind for one in frozen.plan]
    if dtype is None or kind != "gate" or name == "se":  # depthwise layers have no kernel in bf16
        assert len(chains_of(frozen)) == chains, chains_of(frozen)
    if dtype is None:
        assert_frozen_equals(model, frozen, x)
        assert_frozen_equals(model, frozen, torch.randn(5, *shape[1:]))
    frozen.save(tmp_path / "frozen")
    loaded = sparsekd.load_frozen(tmp_path / "frozen", build())
    y = torch.randn(3, *shape[1:])
    assert torch.equal(loaded(y), frozen(y))
    plain = frozen.to_torch()(y.bfloat16() if dtype else y).float()
    bound = 0.1 if dtype else 1e-4
    torch.testing.assert_close(plain, frozen(y), rtol=bound, atol=bound)


@needs_kernels
def test_a_gate_takes_in_shortcut_and_activation(ours_wins):  # noqa: F811
    frozen = quick(trained(SEBottleneck()), torch.randn(2, 16, 6, 6), memory_format="channels_last")
    assert [one.geometry.fused for one in frozen.plan if one.geometry.kind == "gate"] == ["add+relu"]


def test_what_is_no_gate_stays():
    """Maps times maps, a gate that is not of this sample, and a product in place of what others read."""

    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            z = y * x * torch.sigmoid(x.mean((0, 2, 3), keepdim=True))
            seen = y.sum()
            y.mul_(y.mean((2, 3), keepdim=True))
            return y, z, seen

    model = Products().eval()
    x = torch.randn(2, 16, 5, 5)
    frozen = quick(model, x)
    assert "gate" not in [one.geometry.kind for one in frozen.plan]
    for got, want in zip(frozen(x), model(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


BETWEEN = {
    "gate": (Between("gate", ("x", "gate"), "float32"), (3, 37, 5, 7)),
    "cat": (Between("cat", ("a", "b", "c"), "float32", (5, 16, 33)), (3, 5, 6, 5)),
    "cat of vectors": (Between("cat", ("a", "b"), "float32", (5, 16)), (3, 5)),
    "layer_norm": (Between("layer_norm", ("x",), "float32", epsilon=1e-5), (3, 4, 201)),
    "layer_norm of few": (Between("layer_norm", ("x",), "float32", epsilon=1e-5), (3, 5)),
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_kernels_compute_what_torch_does(isa, name, layout, dtype, isa_restored):  # noqa: F811
    """Layer norms in float32 to 2e-6, gates to one rounding."""
    if isa not in cpu.native.isas():
        pytest.skip(f"this CPU has no {isa}")
    cpu.native.use_isa(isa)
    between, shape = BETWEEN[name]
    for fused in ({}, {"residual": True, "activation": "gelu"}):
        if fused and between.kind != "gate":
            continue
        geometry = between_geometry(between, shape, **fused)
        weight, bias = torch.empty(0, dtype=dtype), None
        if between.kind == "layer_norm":
            weight, bias = (torch.randn(geometry.weight).to(dtype) for _ in range(2))
        options = {"memory_format": layout, "threads": 2}
        ours = cpu_layer(geometry, weight, bias, chosen="native", **options)
        operands = between_operands(geometry, dtype, layout)
        want = ours.run(*(x.double() for x in operands)) if between.kind != "layer_norm" else F.layer_norm(
            operands[0].double(), geometry.weight, weight.double(), bias.double(), 1e-5
        )  # fmt: skip
        got = alone(ours, operands)().double()
        bound = 2**-8 if dtype is torch.bfloat16 else 2e-6
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)


@needs_kernels
def test_a_layer_norm_far_from_zero_loses_no_digits():
    geometry = between_geometry(Between("layer_norm", ("x",), "float32", epsilon=1e-5), (2, 3, 256))
    x = torch.randn(2, 3, 256) + 1000
    ours = cpu_layer(
        geometry, torch.ones(256), torch.zeros(256), chosen="native", memory_format="contiguous", threads=1
    )
    want = F.layer_norm(x.double(), (256,))
    torch.testing.assert_close(alone(ours, [x])().double(), want, rtol=2e-4, atol=2e-4)


class Scaled(nn.Module):
    """A layer scale, as in ConvNeXt and vision transformers."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.gamma = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Parameter(torch.randn(32))

    def forward(self, x):
        x = x + self.gamma * F.gelu(self.one(x))
        return x + self.two(x) * self.gamma


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_layer_scale_is_folded_into_the_layer_in_front(density, tmp_path):
    model = Scaled().eval()
    if density < 1:
        sparsekd.sparsify(model, density=density)
    x = torch.randn(2, 3, 32)
    frozen = quick(model, x)
    assert [(one.name, one.geometry.fused) for one in frozen.plan] == [("one", "gelu"), ("two", "add")]
    assert_frozen_equals(model, frozen, x)
    frozen.save(tmp_path / "frozen")
    assert torch.equal(sparsekd.load_frozen(tmp_path / "frozen", Scaled())(x), frozen(x))
