"""Chains: the layers of a network as one compiled call, whatever the batch, its slices, threads and memory format."""

import sys

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.backends import cpu
from sparsekd.freeze import measure
from sparsekd.freeze.chain import Chain, find_chains
from sparsekd.freeze.layer import FrozenLayer
from sparsekd.freeze.network import runner

from ..cases import torch_threads
from .networks import (
    ALL_SPARSE,
    IMAGE,
    MODELS,
    ResNet,
    assert_frozen_equals,
    ours_throughout,
    quick,
    trained,
    wrong_in_threads,
)

pytestmark = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)


@pytest.fixture(autouse=True)
def _threads():
    with torch_threads(2):
        yield


def all_ours(model: nn.Module, shape, memory_format="channels_last", **options):
    """Frozen with every layer of ours that can be, pruned or not."""
    sparsekd.sparsify(trained(model), density=0.5)
    options = {"min_gain": ALL_SPARSE, "layer_ms": 1.0, **options}
    return sparsekd.freeze(model, torch.randn(shape), memory_format=memory_format, **options)


@pytest.fixture
def ours_wins(monkeypatch):
    """What was never pruned is measured too: let it lose time beside ours."""
    ours_throughout(monkeypatch)


def chains_of(frozen) -> list[list[str]]:
    layers = {name: one for name, one in frozen.network.named_modules() if isinstance(one, FrozenLayer)}
    return [[str(link.y.target) for link in links] for links in find_chains(frozen.network.graph, layers)]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_a_chain_computes_what_its_layers_do(name, memory_format, ours_wins):
    build, shape = MODELS[name]
    frozen = all_ours(build(), shape, memory_format)
    assert chains_of(frozen)
    for images in (0, 1, 2, 3):
        run = runner(frozen.network, images)
        for batch in (1, 2, 5, 8):
            x = torch.randn(batch, *shape[1:])
            want = frozen.network(x)
            got = run(x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
            torch.set_num_threads(1)
            assert torch.equal(run(x), got)  # slices do not depend on threads
            torch.set_num_threads(2)
            if x.dim() == 4:
                assert torch.equal(run(x.contiguous(memory_format=torch.channels_last)), got)
                assert torch.equal(run(torch.cat([x, x], 3)[..., : shape[3]]), got)
    assert runner(frozen.network, 2)(torch.randn(0, *shape[1:])).shape[0] == 0


def test_a_residual_network_is_one_call_with_a_small_buffer(ours_wins):
    frozen = all_ours(ResNet(), IMAGE)
    assert [len(chain) for chain in chains_of(frozen)] == [8]
    layers = {name: one for name, one in frozen.network.named_modules() if isinstance(one, FrozenLayer)}
    (links,) = find_chains(frozen.network.graph, layers)
    chain = Chain(links, 0)
    places, size = chain.places()
    assert len(places) == 7 and chain.outputs == [links[-1].y]
    # conv1, conv2 over the stem's memory; then half maps of twice the channels, a quarter in size
    assert size == 2 * 16 * 12 * 12 * 4


class Taps(nn.Module):
    """Values that are read outside a chain, by torch and by the caller."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x):
        first = self.one(x)
        second = self.two(first).relu()
        return self.three(second + torch.sigmoid(first)), second, first


def test_what_is_read_outside_comes_out(ours_wins):
    frozen = all_ours(Taps(), (2, 16, 6, 6))
    assert chains_of(frozen) == [["one", "two"], ["three"]]
    for batch in (2, 5):
        x = torch.randn(batch, 16, 6, 6)
        for got, want in zip(runner(frozen.network, 1)(x), frozen.network(x), strict=True):
            torch.testing.assert_close(got, want)


class Mixed(nn.Module):
    """A linear layer over the last axis of maps reads contiguous memory, the convolution in front writes another."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(6, 16)

    def forward(self, x):
        return self.linear(self.conv(x))


def test_neighbours_that_disagree_on_memory_are_two_chains(ours_wins):
    frozen = all_ours(Mixed(), (2, 16, 6, 6))
    assert chains_of(frozen) == [["conv"], ["linear"]]
    x = torch.randn(3, 16, 6, 6)
    torch.testing.assert_close(frozen(x), frozen.network(x))


def test_threads_share_no_buffer(ours_wins):
    frozen = all_ours(ResNet(), IMAGE)
    batches = [torch.randn(batch, *IMAGE[1:]) for batch in (1, 2, 5, 3)]
    assert not wrong_in_threads(runner(frozen.network, 1), batches, turns=50, torch_threads=2)


def test_slices_are_chosen_with_the_batch_and_kept_in_files(monkeypatch, tmp_path):
    def times(networks, inputs, options):
        return {name: 1.0 if name == "slices of 2" else 2.0 for name in networks}

    monkeypatch.setattr(sys.modules["sparsekd.freeze.freeze"], "time_networks", times)
    model = sparsekd.sparsify(trained(ResNet()), density=0.4)
    frozen = quick(model, torch.randn(6, *IMAGE[1:]))
    assert frozen.plan.images == 2 and "slices of 2 images" in str(frozen.plan)
    assert quick(model, torch.randn(1, *IMAGE[1:])).plan.images == 0
    frozen.save(tmp_path / "frozen")
    loaded = sparsekd.load_frozen(tmp_path / "frozen", model)
    x = torch.randn(5, *IMAGE[1:])
    assert loaded.plan.images == 2 and torch.equal(loaded(x), frozen(x))
    assert_frozen_equals(model, frozen, x)


@pytest.mark.parametrize(("gain", "ours_throughout"), [(0.8, True), (0.4, False)])
def test_a_slower_layer_of_ours_is_kept_where_the_network_gets_faster(gain, ours_throughout, monkeypatch):
    def samples(timed, seconds):
        return {name: [100 * gain if name == "dense" else 100.0] * 8 for name in timed}

    def times(networks, inputs, options):
        return {name: 1.0 if name == "channels_last, ours throughout" else 2.0 for name in networks}

    monkeypatch.setattr(measure, "measure", samples)
    monkeypatch.setattr(sys.modules["sparsekd.freeze.freeze"], "time_networks", times)
    model = sparsekd.sparsify(trained(ResNet()), density=0.4)
    frozen = sparsekd.freeze(model, torch.randn(IMAGE))
    assert {layer.chosen == "dense" for layer in frozen.plan} == {not ours_throughout}
    assert all(layer.why.endswith("; faster between its neighbours") == ours_throughout for layer in frozen.plan)
    assert_frozen_equals(model, frozen, torch.randn(IMAGE))
    never = sparsekd.freeze(model, torch.randn(IMAGE), min_gain=1.5)  # the caller asks for more than that
    assert {layer.chosen for layer in never.plan} == {"dense"}
