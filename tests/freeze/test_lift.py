"""Conv1d and 1x1x1 Conv3d are frozen as the Conv2d that they are: fused, planned, chained, saved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd
from sparsekd.backends import cpu

from .networks import ALL_DENSE, ALL_SPARSE, Custom, assert_frozen_equals, quick, trained


class Lines(nn.Module):
    """Residual blocks over lines."""

    def __init__(self, spelt=False):
        super().__init__()
        self.one, self.bn = nn.Conv1d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(32)
        self.two = nn.Conv1d(32, 32, 5, padding="same", padding_mode="circular")
        self.three = nn.Conv1d(32, 32, 4, dilation=2)
        self.head, self.spelt = nn.Linear(32, 5), spelt

    def forward(self, x):
        y = F.relu(self.bn(self.one(x)))
        y = F.gelu(self.two(y) + y)
        y = F.conv1d(y, self.three.weight, self.three.bias, dilation=2) if self.spelt else self.three(y)
        return self.head(y.mean(2)).unsqueeze(2) + y[:, :5]


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.bn = nn.Conv3d(16, 32, 1), nn.BatchNorm3d(32)
        self.two, self.whole = nn.Conv3d(32, 32, 1), nn.Conv3d(32, 8, 3)

    def forward(self, x):
        y = F.silu(self.bn(self.one(x)))
        return self.whole(self.two(y).add_(y))


CASES = {
    "lines": (Lines, (2, 16, 21), ["bn+relu", "add+gelu", "", ""]),
    "lines, functional": (lambda: Lines(True), (2, 16, 21), ["bn+relu", "add+gelu", "", ""]),
    "volumes": (Volumes, (2, 16, 3, 5, 4), ["bn+silu", "add"]),
}


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(16, 32, 3), nn.Conv1d(32, 32, 3)
        self.max, self.mean = nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2, padding=1, count_include_pad=True)
        self.whole, self.head = nn.AdaptiveAvgPool1d(1), nn.Linear(32, 5)

    def forward(self, x):
        y = self.two(self.max(self.one(x).relu()))
        return self.head(self.whole(y).flatten(1)) + self.head(y.mean(-1)) + self.head(self.mean(y).sum(2))


def test_pooling_of_lines_is_planned(tmp_path):
    model = sparsekd.sparsify(Pooled().eval(), density=0.5)
    x = torch.randn(3, 16, 21)
    frozen = quick(model, x)
    kinds = [layer.geometry.kind for layer in frozen.plan]
    assert kinds.count("max") == 1 and kinds.count("mean") == 3
    assert_frozen_equals(model, frozen, x)
    assert_frozen_equals(model, frozen, torch.randn(2, 16, 30))
    frozen.save(tmp_path / "frozen")
    assert torch.equal(sparsekd.load_frozen(tmp_path / "frozen", Pooled())(x), frozen(x))


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("min_gain", [ALL_SPARSE, ALL_DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:sparsekd.sparsify")
def test_frozen_as_images(name, min_gain, memory_format, tmp_path):
    build, shape, fused = CASES[name]
    model = sparsekd.sparsify(trained(build()).eval(), density=0.5)
    x = torch.randn(shape)
    frozen = quick(model, x, min_gain=min_gain, memory_format=memory_format)
    layers = [layer for layer in frozen.plan if not layer.geometry.pool]
    assert frozen.plan.eager or [layer.geometry.fused for layer in layers] == fused
    if cpu.native is not None and min_gain == ALL_SPARSE and name != "lines, functional":
        assert {layer.chosen for layer in layers} == {"sparse"}
    assert_frozen_equals(model, frozen, x)
    assert_frozen_equals(model, frozen, torch.randn(5, *shape[1:]))
    frozen.save(tmp_path / "frozen")
    loaded = sparsekd.load_frozen(tmp_path / "frozen", build())
    assert torch.equal(frozen(x), loaded(x))


def test_other_lengths_work():
    model = sparsekd.sparsify(trained(Lines()).eval(), density=0.5)
    frozen = quick(model, torch.randn(2, 16, 21))
    assert_frozen_equals(model, frozen, torch.randn(3, 16, 40))


def test_a_model_traced_by_export_is_lifted_too():
    def forward(model, x):
        return model.conv(x) if x.shape[0] > 0 else x  # which torch.fx cannot trace

    model = Custom(forward).eval()
    model.conv = nn.Conv1d(16, 16, 3)
    sparsekd.sparsify(model, density=0.5)
    x = torch.randn(2, 16, 9)
    frozen = quick(model, x)
    assert frozen.record["traced"] == "torch.export"
    assert [layer.name for layer in frozen.plan] == ["conv"]
    assert_frozen_equals(model, frozen, x)


def test_what_is_called_with_and_without_a_batch_stays():
    model = Custom(lambda m, x: m.conv(x) + m.conv(x[0])).eval()
    model.conv = nn.Conv1d(16, 16, 3)
    x = torch.randn(2, 16, 9)
    frozen = quick(model, x)
    assert len(frozen.plan) == 0
    assert_frozen_equals(model, frozen, x)


class Decoder(nn.Module):
    """What segmentation networks end in."""

    def __init__(self, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.up = nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1, groups=groups, output_padding=1, bias=False)
        self.bn, self.last = nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 16, (2, 3), stride=(2, 1))

    def forward(self, x):
        y = F.relu(self.bn(self.up(self.conv(x))))
        return F.gelu(self.last(y) + 1)


@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("min_gain", [ALL_SPARSE, ALL_DENSE], ids=["sparse", "dense"])
def test_transposed_convolutions_are_planned(min_gain, groups, dtype, tmp_path):
    model = sparsekd.sparsify(trained(Decoder(groups)).eval(), density=0.5)
    x = torch.randn(2, 16, 5, 6)
    frozen = quick(model, x, min_gain=min_gain, dtype=dtype)
    assert frozen.plan.eager or [str(layer.geometry.fused) for layer in frozen.plan] == ["", "bn+relu", ""]
    if cpu.native is not None and min_gain == ALL_SPARSE:
        assert {layer.chosen for layer in frozen.plan} == {"sparse"}
    if dtype is None:
        assert_frozen_equals(model, frozen, x)
        assert_frozen_equals(model, frozen, torch.randn(3, 16, 7, 4))
        torch.testing.assert_close(frozen.to_torch()(x), frozen(x), rtol=1e-4, atol=1e-4)
    frozen.save(tmp_path / "frozen")
    assert torch.equal(sparsekd.load_frozen(tmp_path / "frozen", Decoder(groups))(x), frozen(x))


class Branches(nn.Module):
    """Layers that stay sparse inside a module that nothing takes apart, and one called in two ways."""

    def __init__(self):
        super().__init__()
        self.conv, self.attention = nn.Conv1d(16, 32, 3, padding=1), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        if bool(x.sum() > 1e9):  # which nothing can trace
            return x
        y = self.conv(x).transpose(1, 2) + self.conv(x[0]).T
        return self.attention(y, y, y)[0]


def test_a_file_keeps_layers_that_stay_sparse(tmp_path):
    model = sparsekd.sparsify(Branches().eval(), density=0.5)
    x = torch.randn(2, 16, 7)
    frozen = quick(model, x)
    assert frozen.record["traced"] == ""
    frozen.save(tmp_path / "frozen")
    for fresh in (Branches(), sparsekd.sparsify(Branches(), density=0.9)):
        loaded = sparsekd.load_frozen(tmp_path / "frozen", fresh)
        assert torch.equal(loaded(x), frozen(x))
    assert_frozen_equals(model, frozen, x)
