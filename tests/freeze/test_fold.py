"""A norm is folded into the layer in front of it, exactly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd
from sparsekd import BlockPattern
from sparsekd.backends import cpu
from sparsekd.freeze import load_frozen, measure
from sparsekd.freeze.layer import FrozenLayer
from sparsekd.freeze.sites import Site
from sparsekd.nn import SparseConv2d, SparseLinear

from .networks import (
    IMAGE,
    ResNet,
    gains,
    needs_kernels,
    quick,
    trained,
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("pattern", [None, BlockPattern(16, 1), BlockPattern(5, 3)], ids=str)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_folding_is_exact(kind, pattern, affine, bias):
    layer = nn.Conv2d(7, 37, 3, bias=bias).double() if kind == "conv" else nn.Linear(7, 37, bias=bias).double()
    norm = trained((nn.BatchNorm2d if kind == "conv" else nn.BatchNorm1d)(37, affine=affine)).double().eval()
    x = torch.randn(4, 7, 6, 6).double() if kind == "conv" else torch.randn(4, 7).double()
    if pattern:
        layer = (SparseConv2d if kind == "conv" else SparseLinear).from_dense(layer, pattern, density=0.4)
    weight, folded_bias = measure.fold(Site("layer", "layer", ()), layer, norm)
    dense = weight.to_dense() if pattern else weight
    got = F.conv2d(x, dense, folded_bias) if kind == "conv" else F.linear(x, dense, folded_bias)
    torch.testing.assert_close(got, norm(layer(x)), rtol=1e-12, atol=1e-12)
    if pattern:
        weight.validate()
        assert torch.equal(weight.mask(), layer.block_mask())


def test_float64_networks_stay_exact_and_dense():
    model = sparsekd.sparsify(trained(ResNet()).double(), density=0.4).eval()
    x = torch.randn(IMAGE).double()
    frozen = quick(model, x)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-12, atol=1e-12)
    if cpu.native is not None:
        assert frozen.plan["head"].why == "kernels take float32 and bfloat16, the layer is float64"


@needs_kernels
def test_bfloat16_networks_run_on_the_kernels_of_bfloat16():
    model = sparsekd.sparsify(trained(ResNet()), BlockPattern(16, 2), density=0.4, exclude=["stem.*"]).eval()
    x = torch.randn(IMAGE)
    frozen = quick(copy.deepcopy(model).bfloat16(), x.bfloat16())
    assert {layer.chosen for layer in frozen.plan if layer.pattern} == {"sparse"}
    got, want = frozen(x.bfloat16()), model(x)
    assert got.dtype == torch.bfloat16 and (got - want).abs().max() < 0.05 * want.abs().max()
    with pytest.raises(TypeError, match=r"expected bfloat16 \[N, 16, 12, 12\] on the CPU, got torch.float32"):
        frozen.network.get_submodule("blocks.0.conv1")(torch.randn(1, 16, 12, 12))


@needs_kernels
def test_bf16_inside_float32_outside(tmp_path):
    model = sparsekd.sparsify(trained(ResNet()), BlockPattern(16, 2), density=0.4).eval()
    frozen = quick(model, torch.randn(IMAGE), dtype="bf16")
    assert {layer.chosen for layer in frozen.plan if layer.pattern} == {"sparse"}
    x = torch.randn(3, *IMAGE[1:])
    frozen.save(tmp_path / "frozen")
    loaded = load_frozen(tmp_path / "frozen", model)
    with torch.no_grad():
        want, cast = model(x), copy.deepcopy(model).bfloat16()(x.bfloat16())
    for network in (frozen, loaded):
        got = network(x)
        assert got.dtype == torch.float32 and torch.equal(got, got.bfloat16().float())  # bf16 inside
        assert (got - want).abs().max() <= max(2 * (cast - want).abs().max(), 0.02 * want.abs().max())
    with pytest.raises(TypeError, match=r"expected a torch\.float32 tensor"):
        frozen(x.bfloat16())
    assert model.head.values.dtype == torch.float32  # left as it was
    with pytest.raises(TypeError, match="casts a float32 model"):
        quick(copy.deepcopy(model).bfloat16(), x.bfloat16(), dtype="bf16")
    with pytest.raises(RuntimeError, match="differ from the model's"):
        quick(model, x, dtype="bf16", tolerance=1e-5)


@gains
def test_dead_filters_give_relu_of_their_bias(min_gain):
    conv = nn.Conv2d(8, 48, 3, padding=1)
    mask = torch.ones(BlockPattern().grid(conv.weight.shape), dtype=torch.bool)
    mask[1] = False
    model = trained(nn.Sequential(SparseConv2d.from_dense(conv, mask=mask), nn.BatchNorm2d(48), nn.ReLU()))
    frozen = quick(model, torch.randn(1, 8, 5, 5), min_gain=min_gain)
    y = frozen(torch.randn(2, 8, 5, 5))[:, 16:32]
    bias = next(module for module in frozen.modules() if isinstance(module, FrozenLayer)).bias[16:32]
    assert torch.equal(y, bias.relu().view(1, 16, 1, 1).expand_as(y))
    assert bias.abs().min() > 0
