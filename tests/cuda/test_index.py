"""Index tables, read by hand."""

import torch

from .common import index


def test_a_table_read_by_hand():
    """Two row blocks of 16, three column blocks of 16, 1x1 kernel: row 0 keeps blocks 0 and 2, row 1 keeps 2 alone."""
    row_ptr, col_idx = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 2, 2], dtype=torch.int32)
    weight = index.Weight(32, 48, 16, 16)
    table = index.forward_table(row_ptr, col_idx, weight, rows=32, step=16)
    assert table.tiles[:, :4].tolist() == [[0, 32, 0, 2]]
    assert table.slots[:2].tolist() == [[0, 0, 0, 16], [0, 0, 32, 16]]
    assert table.offsets[:2].tolist() == [[0, index.MISSING], [256, 512]]
    assert table.fill == 0.75 and table.num_steps == 2

    table = index.transposed_table(row_ptr, col_idx, weight, rows=16, step=16)
    assert table.tiles[:, :4].tolist() == [[32, 48, 1, 3], [0, 48, 0, 1], [16, 48, 1, 1]]  # longest first; the ends
    assert table.slots[:3].tolist() == [[0, 0, 0, 16], [0, 0, 0, 16], [0, 0, 16, 16]]
    assert table.offsets[:3].tolist() == [[0], [256], [512]]


def test_a_stride_gives_each_phase_its_own_taps():
    """3x3, stride 2, padding 1: even pixels see the middle tap alone, odd ones the two outer ones."""
    weight = index.Weight(16, 16, 16, 16, (3, 3), (2, 2), (1, 1))
    row_ptr, col_idx = torch.tensor([0, 9], dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    table = index.transposed_table(row_ptr, col_idx, weight, rows=16, step=16)
    steps = {(y, x): end - begin for _, _, begin, end, y, x, _, _ in table.tiles.tolist()}
    assert steps == {(0, 0): 1, (0, 1): 2, (1, 0): 2, (1, 1): 4}
