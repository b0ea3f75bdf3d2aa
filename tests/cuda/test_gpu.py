"""On a GPU only: what the interpreter cannot show."""

import pytest
import torch

import sparsekd
from sparsekd import BlockPattern
from sparsekd.backends import cuda as backend

from .common import CONV_CASES, TRITON, always, assert_as_exact_as_torch, by_id, last, needs_gpu, tiles


def gpu_layer(**options):
    torch.manual_seed(0)
    layer = sparsekd.nn.SparseConv2d(64, 128, 3, padding=1, pattern=BlockPattern(64, 32), density=0.4, **options)
    return layer.cuda().to(memory_format=torch.channels_last), last(torch.randn(4, 64, 14, 14, device="cuda"))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONV_CASES, **by_id)
def test_gpu_half_types(case, dtype, monkeypatch):
    always(monkeypatch, TRITON)
    assert_as_exact_as_torch(case, dtype)


@needs_gpu
def test_gpu_autocast_compile_and_two_bit_equal_runs():
    layer, x = gpu_layer()
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for module in (layer, compiled, layer):
        layer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = module(x)
        y.float().square().sum().backward()
        results.append((y.detach(), layer.values.grad.clone()))
    assert results[0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


@needs_gpu
def test_gpu_training_step_in_a_cuda_graph():
    layer, x = gpu_layer()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    want, grad = layer(x).detach().clone(), layer.values.grad.clone()
    layer.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        layer.values.grad.zero_()
        y.square().sum().backward()
    graph.replay()
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(layer.values.grad, grad)


@needs_gpu
def test_gpu_export_and_opcheck():
    layer, x = gpu_layer()
    exported = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))
    weight = (layer.values, layer.row_ptr, layer.col_idx, layer.bias)
    geometry = (128, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    torch.library.opcheck(torch.ops.sparsekd.conv2d.default, (x.requires_grad_(), *weight, *geometry))


@needs_gpu
def test_gpu_prewarm_measures_every_direction():
    layer, x = gpu_layer()
    measured = backend.prewarm(layer, x.requires_grad_())
    assert {key.split()[0] for key in measured} == set(tiles.DIRECTIONS)
    assert layer.values.grad is None
    assert all(row.microseconds <= row.dense_microseconds for row in measured.values())


@needs_gpu
def test_gpu_offsets_beyond_two_to_the_31():
    """2.2e9 elements: the last image must come out like the first."""
    layer = sparsekd.nn.SparseConv2d(64, 16, 1, bias=False, pattern=BlockPattern(16, 64), density=1.0).cuda().half()
    x = torch.zeros(33, 64, 1024, 1024, device="cuda", dtype=torch.float16, memory_format=torch.channels_last)
    x[0], x[-1] = 1.0, 1.0
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y[0], y[-1]) and y[0].abs().max() > 0


@needs_gpu
def test_gpu_reduce_overhead_without_an_eager_run_before():
    """The warm-up of CUDA graph trees allocates from a pool that is written over: no table may lie in it."""
    layer, x = gpu_layer()
    with torch.no_grad():
        compiled = torch.compile(layer, mode="reduce-overhead")
        outputs = [compiled(x).clone() for _ in range(4)]
        want = layer(x)
    for got in outputs:
        torch.testing.assert_close(got, want)
