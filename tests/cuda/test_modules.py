"""The layers on CUDA without a GPU: fake tensors of device "cuda" go through ops, autocast and export;
what the backend runs in a steady state is watched for anything that waits for the host."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekd import BlockPattern
from sparsekd.backends import cuda as backend
from sparsekd.backends.cuda import choose, masks, plan
from sparsekd.nn import SparseConv2d, SparseLinear

from ..cases import Conv, Linear, random_weight
from .common import DEVICE, SMALL, always, block_products, gather_gemm, index

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason='a torch built without CUDA has not even fake tensors of device "cuda"'
)


def fake(mode, tensor):
    """A tensor without data on "cuda", which need not be there."""
    return FakeTensor(mode, tensor.to("meta"), torch.device("cuda:0"))


@pytest.fixture
def net_and_x():
    """A network and its input on "cuda"; which blocks exist is data, so their number stays that of the real network."""
    net = nn.Sequential(
        SparseConv2d(16, 32, 3, stride=2, padding=1, pattern=BlockPattern(16, 16), density=0.5),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        SparseLinear(32 * 16, 48, pattern=BlockPattern(16, 16), density=0.5),
    )
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    mode = FakeTensorMode()
    x = fake(mode, x)
    for module in net.modules():
        module._buffers.update({name: fake(mode, tensor) for name, tensor in module._buffers.items()})
        parameters = module._parameters.items()
        module._parameters.update({name: nn.Parameter(fake(mode, tensor)) for name, tensor in parameters})
    with mode, torch.no_grad():
        yield net, x


@needs_cuda_build
def test_outputs_and_gradients_stay_on_the_device_and_in_its_layout(net_and_x):
    """Op by op: autograd's own engine wants the device to be there."""
    net, x = net_and_x
    y = net[0](x)
    assert (y.device.type, y.shape) == ("cuda", (4, 32, 4, 4)) and y.is_contiguous(memory_format=torch.channels_last)
    weight, geometry = (net[0].row_ptr, net[0].col_idx), ((3, 3), (2, 2), (1, 1), (1, 1), 1)
    grad_x = torch.ops.sparsekd.conv2d_grad_input(y, net[0].values, *weight, x.shape, *geometry)
    assert (grad_x.device, grad_x.shape, grad_x.stride()) == (x.device, x.shape, x.stride())
    grad_values = torch.ops.sparsekd.conv2d_grad_values(y, x, *weight, 16, 16, *geometry)
    assert (grad_values.device, grad_values.shape) == (x.device, net[0].values.shape)


@needs_cuda_build
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_its_dtype(net_and_x, dtype):
    net, x = net_and_x
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast itself refuses where there is no device
    torch.set_autocast_dtype("cuda", dtype)
    try:
        assert net[0](x).dtype == dtype
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    assert net[0].values.dtype == torch.float32 and net[0](x).dtype == torch.float32


@needs_cuda_build
def test_export_for_cuda(net_and_x):
    net, x = net_and_x
    program = torch.export.export(net.eval(), (x,))
    called = [str(node.target) for node in program.graph.nodes if "sparsekd" in str(node.target)]
    assert called == ["sparsekd.conv2d.default", "sparsekd.linear.default"]
    assert {node.meta["val"].device.type for node in program.graph.nodes if node.op == "call_function"} == {"cuda"}


# ---- The steady state: nothing a CUDA graph could not hold

CHOICES = [plan.DENSE, plan.COMPACT, plan.Choice("triton", SMALL), plan.Choice("triton", SMALL._replace(splits=2))]


class Watch(TorchDispatchMode):
    """Refuses operators whose result, or whose size, the host has to see, and those that bring data from it."""

    REFUSED = ("_local_scalar_dense", "nonzero", "item", "unique", "masked_select", "is_nonzero", "equal", "_to_copy")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} waits for the host"
        assert not (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])), "a bool index"
        return func(*args, **(kwargs or {}))


def steps(case, dtype):
    """The three ops of a case as functions without arguments."""
    blocks, _ = random_weight(case, dtype)
    values, index = blocks.values.to(DEVICE), (blocks.row_ptr.to(DEVICE), blocks.col_idx.to(DEVICE))
    if isinstance(case, Linear):
        x, grad = torch.randn(*case.batch, case.inputs), torch.randn(*case.batch, case.outputs)
        x, grad = x.to(DEVICE, dtype), grad.to(DEVICE, dtype)
        return (
            lambda: backend.linear(x, values, *index, None, case.outputs),
            lambda: backend.linear_grad_input(grad, values, *index, case.inputs),
            lambda: backend.linear_grad_values(grad, x, *index, *values.shape[1:]),
        )
    geometry = (case.kernel, case.stride, case.padding, case.dilation, case.groups)
    x = torch.randn(case.n, case.c, *case.image).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    grad = backend.conv2d(x, values, *index, None, case.k, *geometry)
    return (
        lambda: backend.conv2d(x, values, *index, None, case.k, *geometry),
        lambda: backend.conv2d_grad_input(grad, values, *index, x.shape, *geometry),
        lambda: backend.conv2d_grad_values(grad, x, *index, *values.shape[1:], *geometry),
    )


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Conv("steady", c=32, k=48, stride=(2, 1), image=(5, 4), pattern=BlockPattern(16, 16), density=0.2),
        Linear("steady", batch=(5,), inputs=32, outputs=48, pattern=BlockPattern(16, 16), density=0.4),
        Conv("blocks-for-a-CPU", groups=2, c=12, k=32, pattern=BlockPattern(16, 1)),
        Linear("blocks-for-a-CPU", batch=(5,), pattern=BlockPattern(16, 2)),
    ],
    ids=lambda case: f"{type(case).__name__}-{case.id}",
)
def test_a_second_run_asks_the_host_nothing(case, choice, monkeypatch):
    always(monkeypatch, choice)
    monkeypatch.setattr(choose, "allows_tf32", lambda conv: False)
    masks.masks.clear()
    # Interpreted kernels read their operands on the host; launches themselves are what Triton's launcher does.
    for module in (gather_gemm, block_products) if DEVICE == "cpu" else ():
        for name in ("gather_gemm_kernel", "block_products_kernel", "sum_parts_kernel"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, mock.MagicMock(__getitem__=lambda kernel, grid: lambda *a, **k: None))
    runs = steps(case, torch.float32)
    for run in runs:
        run()
    built = mock.Mock(side_effect=AssertionError("the tables of a mask are built once"))
    monkeypatch.setattr(index, "_assemble", built)
    with Watch():
        for run in runs:
            run()


def test_the_watch_sees_what_waits():
    x = torch.ones(3, device=DEVICE)
    for waits in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: bool(x.any())):
        with Watch(), pytest.raises(AssertionError):
            waits()
