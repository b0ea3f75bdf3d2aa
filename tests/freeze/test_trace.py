"""Models that are hard to trace."""

import torch
from torch import nn

import sparsekd
from sparsekd.freeze import load_frozen
from sparsekd.nn import SparseConv2d

from .networks import (
    ALL_SPARSE,
    IMAGE,
    Custom,
    assert_frozen_equals,
    gains,
    quick,
    trained,
)


class Branching(nn.Module):
    """Its path depends on the data: torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else self.conv(x)


@gains
def test_a_model_that_cannot_be_traced_is_frozen_layer_by_layer(min_gain, tmp_path):
    model = sparsekd.sparsify(trained(Branching()), density=0.5)
    x = torch.rand(IMAGE)
    frozen = quick(model, x, min_gain=min_gain)
    assert "torch.fx cannot trace the model (TraceError: symbolically traced" in frozen.plan.notes[0]
    assert "torch.export cannot trace the model (" in frozen.plan.notes[0]
    assert "one by one, nothing is fused" in frozen.plan.notes[0]
    assert frozen.plan["conv"].chosen == ("sparse" if min_gain == ALL_SPARSE else "dense")
    for sign in (1, -1):
        assert_frozen_equals(model, frozen, sign * x)
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", Branching())(x), frozen(x))


def test_a_trace_by_fx_that_computes_something_else_is_not_used():
    def change_a_view(m, x):
        base = x * 1
        part = base[:, :8]
        part += m.conv(x)[:, :8]  # torch.fx records part = part + ..., which leaves base as it was
        return base

    model = Custom(change_a_view)
    x = torch.randn(2, 16, 5, 5)
    frozen = quick(model, x)
    assert frozen.record["traced"] == "torch.export"
    assert frozen.plan["conv"].chosen == "sparse"
    assert_frozen_equals(model, frozen, x)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x, mask=None, scale: float = 2.0, relu: bool = True):
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        return {"y": (y.relu() if relu else y) * scale, "size": y.shape[0]}


def test_arguments_left_at_their_default():
    model = Optional()
    x = torch.randn(IMAGE)
    frozen = quick(model, x)
    assert not frozen.plan.notes[0].startswith("torch.fx")
    got, want = frozen(x), model(x)
    torch.testing.assert_close(got["y"], want["y"], rtol=1e-4, atol=1e-4)
    assert got["size"] == 2
    mask = torch.rand(2, 16, 10, 10)
    torch.testing.assert_close(quick(model, (x, mask))(x, mask)["y"], model(x, mask)["y"], rtol=1e-4, atol=1e-4)


def test_layers_without_a_batch_dimension_are_left_alone():
    model = nn.Sequential(SparseConv2d(3, 16, 3, density=0.5), nn.ReLU())
    x = torch.randn(3, 6, 6)
    frozen = quick(model, x)
    assert len(frozen.plan) == 0
    assert frozen.plan.notes[-1].endswith(": 0")
    assert_frozen_equals(model, frozen, x)
