"""sparsify and densify: in place, by module name."""

import sys

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import BlockPattern
from sparsekd.nn import SparseConv2d, SparseLinear


def model() -> nn.Sequential:
    net = nn.Sequential()
    net.stem = nn.Conv2d(3, 16, 3, padding=1)
    net.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    net.depthwise = nn.Conv2d(32, 32, 3, groups=32)
    net.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.head = nn.Linear(32, 10)
    return net


def kinds(net: nn.Module) -> dict[str, type]:
    return {name: type(net.get_submodule(name)) for name in ("stem", "body.0", "depthwise", "head")}


def test_sparsify_changes_the_model_in_place():
    net = model()
    assert sparsekd.sparsify(net, density=0.5) is net
    assert kinds(net) == {
        "stem": SparseConv2d,
        "body.0": SparseConv2d,
        "depthwise": nn.Conv2d,
        "head": SparseLinear,
    }
    assert net.body[0].density == pytest.approx(0.5, abs=0.01)


def test_include_and_exclude_name_modules():
    net = sparsekd.sparsify(model(), include=["body.*", "head"], exclude=["head"])
    assert [name for name, kind in kinds(net).items() if kind is SparseConv2d] == ["body.0"]


def test_on_a_gpu_layers_whose_channels_its_kernels_refuse_stay_dense(monkeypatch):
    monkeypatch.setattr(sys.modules["sparsekd.conversion"], "on_gpu", lambda layer: True)
    gpu = BlockPattern.for_device("cuda")
    dense = {"stem": nn.Conv2d, "body.0": SparseConv2d, "depthwise": nn.Conv2d, "head": nn.Linear}
    assert kinds(sparsekd.sparsify(model(), gpu)) == dense
    assert kinds(sparsekd.sparsify(model(), gpu, include=["head"]))["head"] is SparseLinear
    # Blocks for a CPU, in a model that trains on a GPU: there no layer is faster, and all are wanted.
    assert kinds(sparsekd.sparsify(model(), BlockPattern(16, 1)))["stem"] is SparseConv2d


def test_densify_is_the_inverse():
    net = model().eval()
    x = torch.randn(2, 3, 8, 8)
    before = net(x)
    names = [name for name, _ in net.named_parameters()]
    sparsekd.densify(sparsekd.sparsify(net, BlockPattern(8, 2)))
    assert [name for name, _ in net.named_parameters()] == names
    assert torch.equal(net(x), before)


def test_training_and_frozen_flags_survive():
    net = model().eval()
    net.head.weight.requires_grad_(False)
    sparsekd.sparsify(net)
    assert not net.head.training
    assert not net.head.values.requires_grad
    assert net.head.bias.requires_grad


def test_a_layer_under_two_names_stays_one_layer():
    net = nn.Sequential()
    net.a = nn.Linear(16, 16)
    net.b = net.a
    sparsekd.sparsify(net, density=0.5)
    assert net.a is net.b and isinstance(net.a, SparseLinear)
    sparsekd.densify(net)
    assert net.a is net.b and isinstance(net.a, nn.Linear)


def test_layers_that_share_a_weight_stay_dense_and_are_refused_if_named():
    net = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16))
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match="share one weight"):
        sparsekd.sparsify(net, include=["1", "2"])
    assert type(net[1]) is nn.Linear
    with pytest.warns(UserWarning, match="2: shares a weight with 0"):
        sparsekd.sparsify(net)
    assert [type(layer) for layer in net] == [nn.Embedding, SparseLinear, nn.Linear]
    assert net[2].weight is net[0].weight


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\]"),
        ({"include": ["boddy.*"]}, "names no layer of a type that can be block-sparse; the model has stem, body.0"),
        ({"exclude": ["haed"]}, "names no module"),
        ({"include": ["depthwise"]}, "multiple of the block height"),
    ],
)
def test_bad_input(arguments, says):
    with pytest.raises(ValueError, match=says):
        sparsekd.sparsify(model(), **arguments)


def test_a_bare_layer_is_refused():
    with pytest.raises(ValueError, match=r"use SparseLinear.from_dense"):
        sparsekd.sparsify(nn.Linear(4, 4))


def test_a_sparse_model_is_pruned_further():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    dense = net[0].weight.detach().clone()
    sparsekd.sparsify(net, density=0.5, include=["0"])
    parameter = net[0].values
    sparsekd.sparsify(net, density=0.3)
    assert net[0].values is parameter and [layer.density for layer in net] == pytest.approx([0.3, 0.3], abs=0.01)
    once = SparseLinear.from_dense(_with_weight(dense), density=0.3)
    assert torch.equal(net[0].block_mask(), once.block_mask()) and torch.equal(net[0].values, once.values)
    sparsekd.sparsify(net)  # at density 1 what is sparse stays so
    sparsekd.sparsify(net, density=0.1, include=["0"])
    assert [layer.density for layer in net] == pytest.approx([0.1, 0.3], abs=0.01)


def _with_weight(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data.copy_(weight)
    return linear


def test_a_model_that_is_sparser_or_in_other_blocks_is_refused():
    net = sparsekd.sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), density=0.3, exclude=["1"])
    for arguments, says in (
        ({"density": 0.5}, r"layer '0' keeps 77 of 256 blocks already, got density=0.5; .* see Pruner.grow_to"),
        ({"density": 0.1, "pattern": BlockPattern(8, 1)}, r"blocks of 16x1 already, got pattern 8x1; densify"),
    ):
        with pytest.raises(ValueError, match=says):
            sparsekd.sparsify(net, **arguments)
        assert type(net[1]) is nn.Linear and net[0].density == pytest.approx(0.3, abs=0.01)
