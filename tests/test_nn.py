"""The layers as drop-ins: constructor arguments, conversion, state, compile and export."""

import copy
import io

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import sparsekd
from sparsekd import BlockPattern
from sparsekd.nn import SparseConv2d, SparseLinear

CONV_ARGUMENTS = [
    {},
    {"stride": 2},
    {"stride": (2, 1), "padding": (1, 0)},
    {"padding": 2, "dilation": 2},
    {"padding": "same"},
    {"padding": "same", "dilation": 3},
    {"padding": "same", "kernel_size": (4, 2)},
    {"padding": "same", "kernel_size": (4, 2), "padding_mode": "circular"},
    {"padding": "valid"},
    {"bias": False},
    {"groups": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "replicate"},
    {"padding": 1, "padding_mode": "circular", "stride": 2},
    {"dtype": torch.float64},
]


def dense_and_sparse(arguments: dict, mask_seed: int = 1):
    """A torch convolution with masked weight, and SparseConv2d made from it."""
    arguments = {"in_channels": 14, "out_channels": 32, "kernel_size": 3, **arguments}
    dense = nn.Conv2d(**arguments)
    pattern = BlockPattern(16, 1)
    mask = torch.rand(pattern.grid(dense.weight.shape), generator=torch.Generator().manual_seed(mask_seed)) < 0.4
    sparse = SparseConv2d.from_dense(dense, pattern, mask=mask)
    return sparse.to_dense(), sparse, mask


@pytest.mark.parametrize("arguments", CONV_ARGUMENTS, ids=str)
def test_conv2d_is_a_drop_in(arguments):
    dense, sparse, mask = dense_and_sparse(arguments)
    x = torch.randn(2, 14, 9, 10, dtype=arguments.get("dtype", torch.float32))
    for image in (x, x.contiguous(memory_format=torch.channels_last), x[0]):
        torch.testing.assert_close(sparse(image), dense(image), rtol=1e-5, atol=1e-5)
    assert torch.equal(sparse.block_mask(), mask)
    built = SparseConv2d(14, 32, **{"kernel_size": 3, **arguments}, density=0.5)
    assert built(x).shape == dense(x).shape
    assert built.density == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("arguments", CONV_ARGUMENTS, ids=str)
def test_conv2d_round_trips_through_dense(arguments):
    dense, sparse, mask = dense_and_sparse(arguments)
    again = SparseConv2d.from_dense(dense, sparse.pattern, mask=mask)
    assert torch.equal(again.values, sparse.values)
    assert torch.equal(again.to_dense().weight, dense.weight)
    geometry = repr(dense).removeprefix("Conv2d(").split(", bias=")[0].split(", padding_mode=")[0].rstrip(")")
    assert geometry in repr(sparse)


def test_density_one_is_the_dense_layer():
    dense = nn.Conv2d(5, 20, 3, padding=1)
    sparse = SparseConv2d.from_dense(dense)
    assert torch.equal(sparse.to_dense().weight, dense.weight)
    assert sparse.density == 1.0
    x = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 20), (2, 4, 20), (20,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_drop_in(shape, bias):
    dense = nn.Linear(20, 40, bias=bias)
    sparse = SparseLinear.from_dense(dense, density=0.25)
    again = sparse.to_dense()
    x = torch.randn(shape)
    torch.testing.assert_close(sparse(x), again(x), rtol=1e-5, atol=1e-5)
    kept = again.weight != 0
    assert torch.equal(again.weight[kept], dense.weight[kept])
    assert sparse.num_kept == int(kept.sum())


def test_from_dense_shares_no_memory():
    dense = nn.Conv2d(4, 16, 3)
    sparse = SparseConv2d.from_dense(dense)
    before = sparse.values.detach().clone()
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert torch.equal(sparse.values, before)
    assert sparse.bias.abs().sum() > 0


def test_keep_drops_blocks_in_place():
    layer = SparseConv2d(8, 48, 3)
    parameter, before = layer.values, layer.values.detach().clone()
    keep = torch.rand(layer.col_idx.shape[0]) < 0.3
    layer(torch.randn(1, 8, 5, 5)).sum().backward()
    loss = layer(torch.randn(1, 8, 5, 5)).sum()  # a graph that stays alive over the change of shape
    layer.keep_(keep)
    assert layer.values is parameter
    assert parameter.grad is None
    assert torch.equal(parameter, before[keep])
    layer.blocks.validate()
    layer(torch.randn(1, 8, 5, 5)).sum().backward()
    assert parameter.grad.shape == parameter.shape
    assert loss.requires_grad
    with pytest.raises(ValueError, match="one bool for each"):
        layer.keep_(keep)


def test_state_dict_carries_the_blocks_and_any_number_of_them():
    trained = SparseConv2d(8, 32, 3, density=0.2)
    fresh = SparseConv2d(8, 32, 3, density=0.9)
    fresh.load_state_dict(trained.state_dict())
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(fresh(x), trained(x))
    assert set(trained.state_dict()) == {"values", "row_ptr", "col_idx", "bias"}


def test_a_state_of_another_layer_is_refused():
    with pytest.raises(RuntimeError, match="row_ptr of a 16x1 weight"):
        SparseConv2d(8, 32, 3).load_state_dict(SparseConv2d(8, 48, 3).state_dict(), strict=False)


def test_state_survives_safetensors_deepcopy_and_pickle():
    layer = SparseConv2d(8, 32, 3, density=0.2)
    x = torch.randn(1, 8, 6, 6)
    other = SparseConv2d(8, 32, 3)
    other.load_state_dict(load(save(layer.state_dict())))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for copied in (other, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), layer(x))


def test_to_moves_and_casts_everything_but_the_index():
    layer = SparseLinear(8, 32, density=0.5).to(torch.float64)
    assert layer.values.dtype == layer.bias.dtype == torch.float64
    assert layer.row_ptr.dtype == layer.col_idx.dtype == torch.int32
    moved = layer.to("meta")
    assert all(t.is_meta for t in (moved.values, moved.row_ptr, moved.col_idx, moved.bias))


def test_autocast_computes_in_the_autocast_dtype():
    layer = SparseConv2d(8, 32, 3, density=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(1, 8, 6, 6))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32


class Net(nn.Module):
    """Two convolutions and a linear layer, all block-sparse."""

    def __init__(self):
        super().__init__()
        self.conv1 = SparseConv2d(3, 32, 3, padding=1, density=0.5)
        self.conv2 = SparseConv2d(32, 48, 3, stride=2, density=0.3)
        self.head = SparseLinear(48, 10, density=0.6)

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_without_graph_breaks_and_trains(memory_format):
    torch.compiler.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 12, 12).contiguous(memory_format=memory_format)
    y = net(x)
    y.sum().backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    compiled_y = compiled(x)
    compiled_y.sum().backward()
    torch.testing.assert_close(compiled_y, y)
    torch.testing.assert_close([p.grad for p in net.parameters()], want)


def test_exports_with_a_dynamic_batch():
    net = Net().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.randn(2, 3, 12, 12),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(program.module()(x), net(x))


def test_weight_is_a_differentiable_dense_copy():
    layer = SparseConv2d(8, 32, 3, density=0.5)
    assert torch.equal(layer.weight, layer.to_dense().weight)
    layer.weight.square().sum().backward()
    torch.testing.assert_close(layer.values.grad, 2 * layer.values)


def test_sparsified_standard_modules_run():
    """torch's own encoder layer reads linear1.weight on its fast path."""
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        before = encoder(x)
        sparsekd.sparsify(encoder, include=["linear1", "linear2"])
        torch.testing.assert_close(encoder(x), before, rtol=1e-4, atol=1e-5)


def test_padding_and_dilation_may_be_changed_later():
    """The usual surgery for dense prediction."""
    dense = nn.Conv2d(8, 32, 3, padding=1)
    sparse = SparseConv2d.from_dense(dense)
    for layer in (dense, sparse):
        layer.padding, layer.dilation = (2, 2), (2, 2)
    x = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)


def test_the_meta_device():
    with torch.device("meta"):
        assert SparseLinear(16, 16).values.is_meta
    with pytest.raises(ValueError, match="meta device"):
        SparseLinear.from_dense(nn.Linear(4, 4, device="meta"))


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: SparseConv2d(8, 32, 3, density=0), ValueError, r"density must lie in \(0, 1\]"),
        (lambda: SparseConv2d(8, 32, 3, density=1.01), ValueError, "density must lie"),
        (lambda: SparseConv2d(8, 32, 3, groups=4), ValueError, "multiple of the block height"),
        (lambda: SparseConv2d(8, 32, 3, padding="same", stride=2), ValueError, "same"),
        (lambda: SparseConv2d(8, 32, 3, dtype=torch.complex64), TypeError, "floating-point|no CPU block"),
        (lambda: SparseConv2d.from_dense(nn.Linear(2, 2)), TypeError, "expected nn.Conv2d, got Linear"),
        (lambda: SparseConv2d.from_dense(nn.ConvTranspose2d(2, 2, 1)), TypeError, "got ConvTranspose2d"),
        (lambda: SparseLinear.from_dense(nn.Conv2d(2, 2, 1)), TypeError, "expected nn.Linear, got Conv2d"),
        (lambda: SparseConv2d(8, 32, 3)(torch.zeros(1, 7, 5, 5)), ValueError, r"expected \[N, 8, H, W\]"),
        (lambda: SparseLinear(8, 32)(torch.zeros(1, 7)), ValueError, r"expected \[..., 8\]"),
    ],
)
def test_bad_input(build, error, says):
    with pytest.raises(error, match=says):
        build()


def test_nan_weights_are_refused():
    dense = nn.Linear(4, 4)
    nn.init.constant_(dense.weight, float("nan"))
    with pytest.raises(ValueError, match="finite weights"):
        SparseLinear.from_dense(dense, density=0.5)
