"""Which blocks exist: cutting, picture and index of a weight, round trips, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd import BlockPattern, BlockSparse


def test_a_small_weight_cut_by_hand():
    weight = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    mask = torch.tensor([[True, False], [True, True]])
    blocks = BlockSparse.from_dense(weight, BlockPattern(2, 2), mask=mask)
    assert blocks.values.tolist() == [[[1, 2], [4, 5]], [[7, 8], [0, 0]], [[9, 0], [0, 0]]]
    assert blocks.row_ptr.tolist() == [0, 1, 3]
    assert blocks.col_idx.tolist() == [0, 0, 1]
    assert blocks.block_sizes().tolist() == [4, 2, 1]
    assert blocks.to_dense().tolist() == [[1, 2, 0], [4, 5, 0], [7, 8, 9]]


def test_convolution_columns_are_tap_major_channel_last():
    weight = torch.arange(2 * 3 * 1 * 2.0).view(2, 3, 1, 2)  # K=2, C=3, R=1, S=2
    blocks = BlockSparse.from_dense(weight, BlockPattern(2, 1))
    assert blocks.col_idx.tolist() == [0, 1, 2, 3, 4, 5]
    for position, (s, c) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        assert blocks.values[position].flatten().tolist() == weight[:, c, 0, s].tolist()


def test_density_keeps_the_blocks_of_largest_norm():
    weight = torch.zeros(4, 4)
    weight[0, 0], weight[2, 3], weight[3, 1] = 5.0, -7.0, 1.0
    kept = BlockSparse.from_dense(weight, BlockPattern(2, 2), density=0.5).mask()
    assert kept.tolist() == [[True, False], [False, True]]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 3)] * 2) | st.tuples(*[st.integers(1, 40)] * 2),
    pattern=st.builds(BlockPattern, st.integers(1, 17), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_any_mask_round_trips_exactly(shape, pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    mask = torch.rand(pattern.grid(shape), generator=generator) < 0.5
    blocks = BlockSparse.from_dense(weight, pattern, mask=mask)
    blocks.validate()
    assert torch.equal(blocks.mask(), mask)
    dense = blocks.to_dense()
    kept = BlockSparse.from_dense(torch.ones(shape), pattern, mask=mask).to_dense().bool()
    assert torch.equal(dense, torch.where(kept, weight, torch.zeros(())))
    assert int(blocks.block_sizes().sum()) == int(kept.sum())
    assert torch.equal(BlockSparse.from_dense(dense, pattern, mask=mask).values, blocks.values)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\], got 0.0"),
        ({"density": 1.5}, ValueError, "got 1.5"),
        ({"density": float("nan")}, ValueError, "got nan"),
        ({"density": 0.5, "mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "not both"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool)}, ValueError, r"must have shape \(1, 4\), got \(4, 4\)"),
        ({"mask": torch.ones(1, 4)}, TypeError, "mask must be bool"),
    ],
)
def test_bad_choices_are_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        BlockSparse.from_dense(torch.ones(4, 4), BlockPattern(), **arguments)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        BlockSparse.from_dense(torch.tensor([[1.0, float("nan")]]), BlockPattern())


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "16"])
def test_bad_block_sizes_are_refused(size):
    with pytest.raises(ValueError, match="positive int"):
        BlockPattern(size, 1)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("row_ptr", torch.tensor([0, 2], dtype=torch.int32), "row_ptr must rise"),
        ("col_idx", torch.tensor([2, 1, 0], dtype=torch.int32), "ascend"),
        ("col_idx", torch.tensor([0, 1, 9], dtype=torch.int32), "must lie in"),
        ("values", torch.zeros(3, 8, 1), "must have shape"),
    ],
)
def test_a_broken_index_is_refused(name, value, says):
    good = BlockSparse.from_dense(torch.ones(4, 3), BlockPattern())
    parts = {"values": good.values, "row_ptr": good.row_ptr, "col_idx": good.col_idx, name: value}
    with pytest.raises(ValueError, match=says):
        BlockSparse(**parts, shape=good.shape, pattern=good.pattern).validate()


def test_patterns_follow_the_device():
    assert str(BlockPattern.for_device("cpu")) == "16x1"
    assert BlockPattern.parse("16x2") == BlockPattern(16, 2)
    for text in ("16", "16x", "16x1x1", "ax1", "-16x1"):
        with pytest.raises(ValueError, match=f"outputs x inputs as in .*got '{text}'"):
            BlockPattern.parse(text)
    assert str(BlockPattern.for_device("cpu", torch.bfloat16)) == "16x2"
    assert BlockPattern.for_device("cuda").bh % 16 == 0
    with pytest.raises(ValueError, match="cpu or cuda"):
        BlockPattern.for_device("xla")


def test_the_dense_weight_is_a_copy_also_where_blocks_of_whole_rows_lie_as_it_does():
    weight = torch.randn(8, 12)
    sparse = BlockSparse.from_dense(weight, BlockPattern(1, 12))
    sparse.to_dense().zero_()
    assert torch.equal(sparse.to_dense(), weight)
