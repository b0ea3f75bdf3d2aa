"""Masks: noticed when changed, built once, forgotten, refused in a capture."""

from unittest import mock

import pytest
import torch

from sparsekd.backends import cuda as backend
from sparsekd.backends.cuda import device, masks

from ..cases import Linear, tensor_core_case
from .common import DEVICE, TRITON, always, index, operands


def test_a_mask_changed_in_place_is_noticed(monkeypatch):
    always(monkeypatch, TRITON)
    row_ptr, col_idx = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    row_ptr, col_idx = row_ptr.to(DEVICE), col_idx.to(DEVICE)
    x, values = torch.randn(4, 32, device=DEVICE), torch.randn(1, 16, 16, device=DEVICE)
    torch.testing.assert_close(backend.linear(x, values, row_ptr, col_idx, None, 16), x[:, :16] @ values[0].T)
    col_idx.fill_(1)
    torch.testing.assert_close(backend.linear(x, values, row_ptr, col_idx, None, 16), x[:, 16:] @ values[0].T)


def test_masks_that_begin_at_one_address_are_told_apart_by_their_strides(monkeypatch):
    always(monkeypatch, TRITON)
    row_ptr = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    stored = torch.tensor([0, 1, 0, 1], dtype=torch.int32, device=DEVICE)
    x, values = torch.randn(4, 32, device=DEVICE), torch.randn(2, 16, 16, device=DEVICE)
    for columns, second in ((stored[:2], x[:, 16:]), (stored[::2], x[:, :16])):
        want = torch.cat([x[:, :16] @ values[0].T, second @ values[1].T], 1)
        torch.testing.assert_close(backend.linear(x, values, row_ptr, columns, None, 32), want)
    assert len(masks.masks) == 2


def test_tables_are_built_once_and_old_masks_forgotten(monkeypatch):
    always(monkeypatch, TRITON)
    monkeypatch.setattr(masks, "MASKS_KEPT", 2)
    built = mock.Mock(wraps=index.forward_table)
    monkeypatch.setattr(index, "forward_table", built)
    case = tensor_core_case(Linear("small", batch=(2,)))
    x, values, blocks = operands(case, torch.float32)
    views = [(blocks.row_ptr, blocks.col_idx), (blocks.row_ptr.detach(), blocks.col_idx.view(-1))]
    for row_ptr, col_idx in views:  # what autograd hands to the backward pass is another object for the same memory
        backend.linear(x, values, row_ptr, col_idx, None, case.outputs)
    assert built.call_count == 1
    for _ in range(3):
        backend.linear(x, values, blocks.row_ptr.clone(), blocks.col_idx.clone(), None, case.outputs)
    assert built.call_count == 4 and len(masks.masks) == 2


def test_of_many_sizes_a_mask_keeps_a_few(monkeypatch):
    always(monkeypatch, TRITON)
    monkeypatch.setattr(masks, "SIZES_KEPT", 3)
    case = tensor_core_case(Linear("lengths", batch=(2,)))
    _, values, blocks = operands(case, torch.float32)
    mask = masks.masks.of(blocks.row_ptr, blocks.col_idx, case.outputs, case.inputs, values)
    for length in (*range(1, 8), 7):
        x = torch.randn(length, case.inputs, device=DEVICE)
        got = backend.linear(x, values, blocks.row_ptr, blocks.col_idx, None, case.outputs)
        torch.testing.assert_close(got, x @ blocks.to_dense().T, rtol=1e-4, atol=1e-4)
        assert 1 <= len(mask.ready) <= 3 and 1 <= len(mask.choices) <= 3


def test_masks_a_graph_reads_are_never_forgotten(monkeypatch):
    monkeypatch.setattr(masks, "MASKS_KEPT", 1)
    weight = 16, 16, torch.empty(1, 16, 16)
    indices = [(torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)) for _ in range(3)]
    captured = masks.masks.of(*indices[0], *weight)
    captured.captured = True
    masks.masks.of(*indices[1], *weight)
    masks.masks.of(*indices[2], *weight)
    assert captured in masks.masks and len(masks.masks) == 2


def test_a_new_mask_inside_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(device, "is_capturing", lambda tensor: True)
    always(monkeypatch, TRITON)
    case = tensor_core_case(Linear("small", batch=(2,)))
    x, values, blocks = operands(case, torch.float32)
    with pytest.raises(RuntimeError, match="run the model once before capturing"):
        backend.linear(x, values, blocks.row_ptr, blocks.col_idx, None, case.outputs)
