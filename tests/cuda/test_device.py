"""Devices, streams and memory, with CUDA mocked where there is none: what one idle GPU would not show."""

import threading
from unittest import mock

import pytest
import torch

from sparsekd import BlockPattern
from sparsekd.backends import cuda as backend
from sparsekd.backends.cuda import choose, device, masks, plan

from ..cases import Conv
from .common import TRITON, always, conv_problem, gather_gemm, geometry, operands


class Streams:
    """Records what happens in which thread, and on which stream."""

    def __init__(self, monkeypatch):
        self.seen, self.side = [], mock.MagicMock(name="side")
        self.side.wait_stream.side_effect = lambda other: self.note("side waits for the caller")
        self.side.synchronize.side_effect = lambda: self.note("the host waits for side")
        monkeypatch.setattr(device, "side_stream", lambda where: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda where=None: mock.MagicMock())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda value: mock.MagicMock(__exit__=lambda *error: False))

    def note(self, what):
        self.seen.append((what, threading.get_ident()))


def on_cuda():
    return mock.MagicMock(is_cuda=True, device=torch.device("cuda", 1))


def test_what_is_kept_is_built_in_a_thread_and_on_a_stream_of_its_own(monkeypatch):
    """The pool of a graph takes what the capturing, or warming, thread allocates; a reader may be on any stream."""
    streams = Streams(monkeypatch)

    def build():
        streams.note("built")
        return torch.is_grad_enabled()

    assert device.build_to_keep(build, on_cuda()) is False
    names, threads = zip(*streams.seen, strict=True)
    assert names == ("side waits for the caller", "built", "the host waits for side")
    assert threads[0] == threading.get_ident() != threads[1] == threads[2]


def test_what_building_raises_arrives(monkeypatch):
    Streams(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        device.build_to_keep(lambda: 1 // 0, on_cuda())


def test_tables_positions_and_channels_are_built_to_be_kept(monkeypatch):
    built = mock.Mock(side_effect=lambda build, like: build())
    monkeypatch.setattr(masks, "build_to_keep", built)
    problem, mask, values = conv_problem(0.3)
    choose.candidates(problem, mask, values)
    mask.dense(values)
    tables = len(mask.tables)
    assert tables and built.call_count == tables + 2  # channels, position


def test_no_mask_is_forgotten_while_a_stream_may_read_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(masks, "MASKS_KEPT", 1)
    kept = masks.Masks()
    where = torch.device("cuda", 1)
    for place in range(2):
        index = mock.MagicMock(shape=(1,), device=where, is_cuda=True, _version=0)
        index.data_ptr.return_value, index.is_inference.return_value = 16 * place, False
        with mock.patch.object(masks, "is_capturing", lambda x: False):
            kept.of(index, index, 16, 16, torch.empty(1, 16, 16))
    assert waited == [where] and len(kept) == 1


def test_ops_make_their_device_the_current_one(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda where: entered.append(where) or mock.MagicMock())
    with device.on(torch.device("cuda", 1)):
        pass
    with device.on(torch.device("cuda", 0)):
        pass
    assert entered == [torch.device("cuda", 1)]


def test_operands_that_begin_anywhere_are_copied(monkeypatch):
    """Bias, values, input and residual as views that begin at 2 bytes; the kernels get multiples of 16."""
    always(monkeypatch, TRITON)
    case = Conv("views", n=1, c=32, k=32, image=(4, 4), pattern=BlockPattern(16, 16), density=0.5)
    x, values, blocks = operands(case, torch.float16)
    bias, residual = torch.randn(case.k).half(), torch.randn(1, case.k, 4, 4).half()
    want = backend.conv2d(x, values, blocks.row_ptr, blocks.col_idx, bias, case.k, *geometry(case), residual=residual)
    seen = []

    def called(self, x, values, out, bias=None, residual=None):
        seen.extend((x, values, bias, residual))
        return out

    monkeypatch.setattr(gather_gemm.GatherGemm, "__call__", called)
    with mock.patch.object(choose, "run", lambda *more: more[-1].triton(TRITON.tile)):
        shifted = [misaligned(tensor) for tensor in (x, values, bias, residual)]
        assert all(tensor.data_ptr() % 16 for tensor in shifted)
        x, values, bias, residual = shifted
        backend.conv2d(x, values, blocks.row_ptr, blocks.col_idx, bias, case.k, *geometry(case), residual=residual)
    assert len(seen) == 4 and all(tensor.data_ptr() % 16 == 0 for tensor in seen)
    for got, meant in zip(seen, shifted, strict=True):
        assert torch.equal(got, meant)
    assert want.isfinite().all()


def misaligned(tensor):
    """The same values in memory that begins 2 bytes behind a multiple of 16."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = buffer[1:].as_strided(tensor.shape, tensor.stride(), 1)
    return view.copy_(tensor)


def test_dense_is_searched_for_wherever_we_compare_with_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    seen = []
    monkeypatch.setattr(
        plan,
        "medians",
        lambda calls, *_, **__: seen.append(torch.backends.cudnn.benchmark) or dict.fromkeys(calls, 1.0),
    )
    case = Conv("searched", n=1, image=(4, 4), pattern=BlockPattern(16, 16), c=32)
    x, values, blocks = operands(case, torch.float16)
    with plan.measuring():
        backend.conv2d(x, values, blocks.row_ptr, blocks.col_idx, None, case.k, *geometry(case))
    assert seen == [True] and torch.backends.cudnn.benchmark is False
