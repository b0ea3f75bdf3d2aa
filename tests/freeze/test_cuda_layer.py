"""The ways to run a frozen layer on a GPU: what does not compute what torch does is left out, the fastest stays."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from sparsekd import BlockPattern, BlockSparse
from sparsekd.freeze import cuda, cuda_layer, measure
from sparsekd.freeze.dense import torch_conv2d
from sparsekd.freeze.plan import Geometry

from ..cuda.common import GPU, gather_gemm  # noqa: F401  (interpreted where there is no GPU)

pytestmark = pytest.mark.skipif(GPU, reason="what is mocked here is there")


def geometry(activation="relu", residual=True, kernel=3, channels=32):
    sizes = {"stride": (1, 1), "padding": (kernel // 2, kernel // 2)}
    weight = (32, channels, kernel, kernel)
    return Geometry("conv2d", (2, channels, 5, 5), weight, **sizes, residual=residual, activation=activation)


def operands(where):
    weight = torch.randn(where.weight).contiguous(memory_format=torch.channels_last)
    x, residual = torch.randn(where.input), torch.randn(2, *where.output)
    last = {"memory_format": torch.channels_last}
    return weight, torch.randn(32), x.contiguous(**last), residual.contiguous(**last) if where.residual else None


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_cudnns_fused_call_gets_what_it_wants(bias, residual, monkeypatch):
    def relu(x, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, *steps):
        assert z.is_contiguous(memory_format=torch.channels_last) and bias is not None
        return (F.conv2d(x, weight, bias, *steps) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu, raising=False)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu, raising=False)
    where = geometry(residual=residual)
    weight, shift, x, added = operands(where)
    shift = shift if bias else None
    got = cuda_layer.cudnn_conv2d(where, weight, shift)(x, added)
    torch.testing.assert_close(got, torch_conv2d(where, weight, shift)(x, added))


@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
def test_one_pass_behind_a_convolution_computes_what_three_do(activation):
    where = geometry(activation)
    weight, bias, x, added = operands(where)
    got = cuda_layer.one_pass_conv2d(where, weight, bias)(x, added)
    torch.testing.assert_close(got, torch_conv2d(where, weight, bias)(x, added.clone()), rtol=1e-5, atol=1e-5)


def chosen(where, weight, monkeypatch, fastest, broken=()):
    """The layer and its plan, where ``fastest`` seems to be, and the ways ``broken`` compute nonsense."""

    def medians(calls, *_, **__):
        return {name: 1e-6 if name == fastest else 2e-6 for name in calls}

    monkeypatch.setattr(cuda_layer, "medians", medians)
    monkeypatch.setattr(cuda_layer.backend, "measure", lambda run, *operands: mock.Mock(choice="triton 1x1"))
    library = cuda_layer.library_ways

    def ways(*arguments):
        found = library(*arguments)
        return found | {name: lambda x, residual=None, reuse=False: 2 * found["torch"](x, residual) for name in broken}

    monkeypatch.setattr(cuda_layer, "library_ways", ways)
    return cuda_layer.gpu_layer("layer", where, weight, torch.randn(32))


def test_a_dense_layer_of_one_pixel_may_run_on_our_kernel(monkeypatch):
    where = geometry("silu", kernel=1)
    layer, plan = chosen(where, torch.randn(where.weight), monkeypatch, "sparsekd")
    assert (plan.chosen, plan.sparse_us, plan.dense_us) == (
        "native",
        1.0,
        2.0,
    ) and "triton 1x1) was fastest" in plan.why
    _, _, x, added = operands(where)
    dense = BlockSparse(layer.values, layer.row_ptr, layer.col_idx, where.weight, BlockPattern(32, 32)).to_dense()
    torch.testing.assert_close(layer(x, added), F.silu(F.conv2d(x, dense, layer.bias) + added), rtol=1e-4, atol=1e-4)


def test_wide_kernels_of_dense_layers_stay_with_the_library(monkeypatch):
    layer, plan = chosen(geometry("silu"), torch.randn(32, 32, 3, 3), monkeypatch, "torch and one pass")
    assert plan.chosen == "dense" and plan.why == "torch and one pass was fastest; not block-sparse"
    assert dict(layer.named_buffers()).keys() == {"bias", "weight"}


def test_a_way_that_computes_something_else_is_left_out_and_named(monkeypatch):
    _, plan = chosen(geometry("silu"), torch.randn(32, 32, 3, 3), monkeypatch, "cuDNN fused", broken=["cuDNN fused"])
    assert plan.chosen == "dense" and "cuDNN fused was left out: it differs from dense by" in plan.why
    assert "cuDNN fused was fastest" not in plan.why


def test_operands_are_drawn_where_the_weight_is(monkeypatch):
    """On the device: to draw a batch of 256 on the host takes seconds."""
    made = []
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": made.append(torch.device(device)) or generator())
    drawn = mock.Mock(side_effect=lambda shape, generator, device: torch.zeros(shape))
    monkeypatch.setattr(torch, "randn", drawn)
    weight = mock.Mock(spec=torch.Tensor, dtype=torch.float32, device=torch.device("cuda", 1))
    measure.random_operands(geometry(), weight, "channels_last", "channels_last")
    assert made == [torch.device("cuda", 1)]
    assert {call.kwargs["device"] for call in drawn.call_args_list} == {torch.device("cuda", 1)}


def test_a_frozen_network_runs_on_its_device_whatever_the_current_one(monkeypatch):
    entered, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(cuda, "on", lambda where: entered.append(where) or mock.MagicMock())
    monkeypatch.setattr(cuda, "capture", lambda run, inputs: run)
    x = torch.ones(2, 3)
    frozen = mock.MagicMock(_device=device, _graphs={})
    frozen.call.flatten.return_value = (x,)
    frozen.result = torch.Tensor.clone
    assert torch.equal(cuda.FrozenCudaModel.forward(frozen, x), x) and entered == [device]


def test_a_graph_that_holds_nothing_is_seen(monkeypatch):
    """Captured on another stream than the work ran on, a graph replays nothing: its outputs must not look right."""
    stream = mock.MagicMock()
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda which: mock.MagicMock(__exit__=lambda *error: False))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.MagicMock)
    replay = cuda.capture(lambda x: 2 * x, (torch.ones(1, 2),))
    assert math.isnan(replay(torch.ones(1, 2)).sum().item())
