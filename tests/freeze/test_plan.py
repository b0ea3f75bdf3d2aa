"""The plan: what was measured, chosen and said."""

import json
import sys

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import timing
from sparsekd.freeze import Plan, freeze, load_frozen
from sparsekd.freeze.layer import FrozenLayer
from sparsekd.nn import SparseConv2d

from .networks import (
    IMAGE,
    ResNet,
    assert_frozen_equals,
    needs_kernels,
    quick,
    trained,
)


@needs_kernels
def test_plan_says_what_was_measured_and_why(monkeypatch):
    # On a busy machine the dense network, whose plan has no layers, may be measured as the fastest.
    monkeypatch.setattr(sys.modules["sparsekd.freeze.freeze"], "dense_twin", lambda model, tables: None)
    model = sparsekd.sparsify(trained(ResNet()), density=0.4, exclude=["stem.*"])
    frozen = freeze(model, torch.randn(IMAGE), layer_ms=5)
    plan = frozen.plan
    assert [layer.name for layer in plan][:2] == ["stem.0", "blocks.0.conv1"]
    stem, conv = plan["stem.0"], plan["blocks.1.conv1"]
    assert stem.pattern is None and stem.chosen in ("dense", "native") and stem.why.startswith("native is ")
    assert (conv.geometry.input, conv.geometry.weight, conv.pattern) == ((2, 16, 12, 12), (32, 16, 3, 3), "16x1")
    assert conv.density == pytest.approx(model.blocks[1].conv1.density)
    for layer in plan:
        assert layer.dense_us > 0
        if layer.chosen != "dense" and "neighbours" not in layer.why:
            assert layer.sparse_us < layer.dense_us
            assert "x as fast" in layer.why
    assert {"unfrozen", "contiguous", "channels_last"} <= set(plan.network_us)
    us = {name: us for name, us in plan.network_us.items() if not name.startswith(("unfrozen", "slices"))}
    assert plan.memory_format == min(us, key=us.__getitem__).split(",")[0]
    table = str(plan).splitlines()
    assert " ".join(table[0].split()) == "layer input weight fused density dense us sparse us chosen why"
    assert "32x16x3x3 /2" in table[4]
    assert len(table) == 1 + len(plan) + 1


def test_plan_survives_json():
    plan = quick(sparsekd.sparsify(ResNet(), density=0.4), torch.randn(IMAGE)).plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@needs_kernels
def test_the_slower_kernel_is_not_chosen(monkeypatch):
    """Sparse that takes as long as dense, give or take, is noise: dense stays."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks) * 1e-3)  # every sample takes 1 ms
    model = nn.Sequential(SparseConv2d(16, 16, 3, density=0.1))
    assert freeze(model, torch.randn(1, 16, 8, 8), layer_ms=1).plan["0"].chosen == "dense"


def test_threads_are_set_back():
    torch.set_num_threads(2)
    frozen = quick(ResNet(), torch.randn(IMAGE), threads=1)
    assert (frozen.plan.threads, torch.get_num_threads()) == (1, 2)
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        freeze(ResNet(), torch.randn(IMAGE), threads=0)


def test_a_model_with_nothing_to_choose_says_so():
    model = trained(ResNet())
    frozen = quick(model, torch.randn(IMAGE))
    assert "sparse" not in {layer.chosen for layer in frozen.plan}
    assert "no block-sparse layer" in str(frozen.plan)
    assert_frozen_equals(model, frozen, torch.randn(IMAGE))


def test_without_the_compiled_module_everything_is_dense(take_kernels_away):
    model = sparsekd.sparsify(trained(ResNet()), density=0.4)
    take_kernels_away()
    frozen = quick(model, torch.randn(IMAGE))
    assert {layer.chosen for layer in frozen.plan} == {"dense"}
    assert frozen.plan["blocks.0.conv1"].why == "sparsekd._C is not there"
    assert "every layer stays dense: sparsekd._C is not there" in frozen.plan.notes
    assert_frozen_equals(model, frozen, torch.randn(IMAGE))


def test_what_is_faster_as_it_is_runs_as_it_is(monkeypatch, tmp_path):
    """And a file keeps its blocks."""

    def build():
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    def dense_wins(networks, inputs, options):
        return {name: 1.0 if name == "dense, unfrozen" else 2.0 for name in networks}

    monkeypatch.setattr(sys.modules["sparsekd.freeze.freeze"], "time_networks", dense_wins)
    model, x = sparsekd.sparsify(build(), density=0.3), torch.randn(4, 64)
    frozen = quick(model, x, min_gain=1.0)
    assert frozen.plan.eager and not len(frozen.plan)
    assert "the model's own forward runs, with dense layers" in frozen.plan.notes[0]
    assert not any(isinstance(module, FrozenLayer) for module in frozen.modules())
    torch.testing.assert_close(frozen(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    frozen.save(tmp_path / "frozen")
    assert (tmp_path / "frozen").stat().st_size < 0.75 * 4 * 64 * 72
    for fresh in (build(), sparsekd.sparsify(build(), density=0.9)):
        assert torch.equal(load_frozen(tmp_path / "frozen", fresh)(x), frozen(x))
    assert quick(model, x).plan.eager is False  # who asks for all of it sparse gets it
