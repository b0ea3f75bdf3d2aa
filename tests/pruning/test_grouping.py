"""Blocks that go together: what the kernels of a GPU like."""

import pytest
import torch
from torch import nn

from sparsekd import BlockPattern
from sparsekd.nn import SparseConv2d
from sparsekd.pruning import (
    Grouping,
    Pruner,
)

from .common import (
    Net,
)


def grouped(grouping, share):
    """The block mask ``[8, 8, 3, 3]`` of a 32 -> 32 convolution pruned under a grouping, in two steps."""
    conv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    pruner = Pruner(conv, pattern=BlockPattern(4, 4), grouping=grouping)
    for part in (share / 2, share):
        pruner.prune_to(part)
    pruner.check()
    return conv[0].block_mask(), pruner


def test_groups_of_rows_share_their_columns():
    mask, pruner = grouped(Grouping(rows=16), 0.6)
    together = mask.view(2, 4, 8, 3, 3)
    assert (together == together[:, :1]).all() and not torch.equal(mask[0], mask[4])
    assert pruner.removed_share == pytest.approx(0.6, abs=0.01)


def test_square_groups_and_whole_taps():
    mask, _ = grouped(Grouping(rows=8, cols=16, taps=True), 0.5)
    together = mask.view(4, 2, 2, 4, 9)
    assert (together == together[:, :1, :, :1, :1]).all() and 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("rows", [0, 8])
def test_equal_rows_keep_their_strongest_columns(rows):
    torch.manual_seed(1)
    conv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    with torch.no_grad():
        conv[0].weight[:16] *= 10  # without `equal`, all would go from the other half
    pruner = Pruner(conv, pattern=BlockPattern(4, 4), grouping=Grouping(rows=rows, equal=True))
    before = conv[0].blocks
    pruner.prune_to(0.7)
    mask, tall = conv[0].block_mask(), max(rows // 4, 1)
    assert mask.flatten(1).sum(1).unique().numel() == 1
    norms = torch.zeros(8, 72).index_put((before.row_block(), before.col_idx.long()), energy(before))
    of_group = norms.view(8 // tall, tall, 72).sum(1)
    kept = mask.permute(0, 2, 3, 1).reshape(8 // tall, tall, 72)[:, 0]
    count = int(kept[0].sum())
    assert torch.equal(kept, of_group.argsort(1, descending=True).argsort(1) < count)


def energy(blocks):
    return blocks.values.square().sum((1, 2))


def test_a_student_pruned_for_a_gpu_runs_on_a_cpu_and_in_its_blocks():
    grouping = Grouping.for_device("cuda")
    net = nn.Sequential(nn.Conv2d(64, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 40, 1))
    pruner = Pruner(net, pattern=BlockPattern.for_device("cuda"), grouping=grouping)
    pruner.prune_to(0.5)
    first = net[0].blocks
    sets = first.mask().view(2, -1, *first.mask().shape[1:])  # two groups of 256 channels
    assert (sets == sets[:, :1]).all() and len(set(first.mask().flatten(1).sum(1).tolist())) == 1
    x = torch.randn(2, 64, 5, 5)
    want = nn.functional.conv2d(x, first.to_dense(), net[0].bias, padding=1)
    torch.testing.assert_close(net[0](x), want, rtol=1e-4, atol=1e-4)
    fine = first.repack(BlockPattern(16, 1))
    fine.validate()
    layer = SparseConv2d.from_dense(net[0].to_dense(), BlockPattern(16, 1), mask=fine.mask())
    assert layer.num_kept == net[0].num_kept
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(fine.to_dense(), first.to_dense())
    with pytest.raises(ValueError, match="blocks of 16x3 must divide those of 64x32"):
        first.repack(BlockPattern(16, 3))


def test_a_grouping_is_part_of_a_pruners_state():
    _, pruner = grouped(Grouping(rows=16), 0.5)
    _, other = grouped(Grouping(rows=8), 0.0)
    with pytest.raises(ValueError, match=r"expected layers .*grouping"):
        other.load_state_dict(pruner.state_dict())
    _, same = grouped(Grouping(rows=16), 0.0)
    same.load_state_dict(pruner.state_dict())
    assert same.num_kept == pruner.num_kept


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Grouping(rows=-1), "rows must be channels"),
        (lambda: grouped(Grouping(rows=18), 0.5), "rows must be a multiple of the block's 4 channels, got 18"),
        (lambda: Pruner(Net(), granularity="filter", grouping=Grouping(rows=16)), "belongs to granularity 'block'"),
    ],
)
def test_groupings_that_fit_nothing_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
