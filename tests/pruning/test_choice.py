"""Which units go: scores, scopes, and targets that are hit to one unit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsekd import BlockPattern
from sparsekd.nn import SparseLinear
from sparsekd.pruning import (
    choose_units,
    lamp_scores,
    layer_ranks,
    magnitude_scores,
)

from .common import (
    GRANULARITIES,
    Net,
    dense_weights,
    nonzeros,
    pruner_of,
)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_choice_is_exact_to_one_unit_and_takes_the_lowest(data):
    layers = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    # Few distinct scores: ties are the rule.
    scores = [torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))).double() for n in layers]
    sizes = [torch.tensor(data.draw(st.lists(st.integers(1, 16), min_size=n, max_size=n))) for n in layers]
    best = [int(score.argmax()) for score in scores]
    reachable = sum(int(size.sum() - size[i]) for size, i in zip(sizes, best, strict=True))
    remove = data.draw(st.floats(0, reachable))
    keep = choose_units(scores, sizes, remove)
    removed = sum(int(size[~kept].sum()) for size, kept in zip(sizes, keep, strict=True))
    assert abs(removed - remove) <= max(int(size.max()) for size in sizes) / 2
    assert all(bool(kept[i]) for kept, i in zip(keep, best, strict=True))
    gone = torch.cat([score[~kept] for score, kept in zip(scores, keep, strict=True)])
    others = [score[kept & (torch.arange(len(kept)) != i)] for score, kept, i in zip(scores, keep, best, strict=True)]
    if len(gone) and len(torch.cat(others)):
        assert gone.max() <= torch.cat(others).min()


def test_among_equals_the_later_unit_goes():
    keep = choose_units([torch.ones(3), torch.ones(3)], [torch.full((3,), 2), torch.full((3,), 2)], remove=6)
    assert [kept.tolist() for kept in keep] == [[True, True, False], [True, False, False]]


def test_a_choice_that_would_empty_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"at most 4 of 6 weights can go.*got 6 to remove"):
        choose_units([torch.arange(3.0)], [torch.full((3,), 2)], remove=6)


def test_scores_of_ragged_blocks_count_only_real_weights():
    weight = torch.full((5, 3), 2.0)
    layer = SparseLinear.from_dense(_linear(weight), BlockPattern(4, 2))
    assert layer.blocks.block_sizes().tolist() == [8, 4, 2, 1]
    assert magnitude_scores(layer).tolist() == [2.0, 2.0, 2.0, 2.0]


def _linear(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data.copy_(weight)
    return linear


def test_ranks_count_what_was_gone_before():
    ranks = layer_ranks(torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([2, 2, 2]), num_weights=8)
    assert ranks.tolist() == [7 / 8, 3 / 8, 5 / 8]


# Targets


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_every_target_is_hit_to_one_unit(granularity, scope, data):
    widths = data.draw(st.tuples(st.integers(2, 9), st.integers(2, 19)))
    net = Net(*widths)
    pattern = BlockPattern(data.draw(st.sampled_from([1, 4, 16])), data.draw(st.sampled_from([1, 3])))
    pruner = pruner_of(net, granularity, pattern, scope=scope, rewindable=False)
    original = nonzeros(net)
    assert pruner.num_weights == original == 9 * 2 * widths[0] + 9 * widths[0] * widths[1] + 3 * widths[1]
    largest = {"block": pattern.bh * pattern.bw, "filter": 9 * widths[0], "unstructured": 1}[granularity]
    for target in sorted(data.draw(st.lists(st.floats(0, 0.95), min_size=1, max_size=4))):
        try:
            pruner.prune_to(target)
        except ValueError as error:
            assert "one unit of each layer stays" in str(error)
            assert nonzeros(net) == pruner.num_kept  # and nothing has changed
            return
        pruner.check()
        assert nonzeros(net) == pruner.num_kept
        assert abs(original - pruner.num_kept - target * original) < largest
        assert pruner.removed_share == pytest.approx(1 - pruner.num_kept / original)
        assert all(bool(weight.any()) for weight in dense_weights(net).values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layer_scope_takes_the_same_share_from_every_layer(granularity):
    net = nn.Sequential(nn.Conv2d(2, 20, 3), nn.Conv2d(20, 40, 3), nn.Flatten(), nn.Linear(40, 30))
    with torch.no_grad():
        net[1].weight.mul_(0.01)  # under global scope this layer alone would pay
    pruner = pruner_of(net, granularity, BlockPattern(4, 1), scope="layer", example_inputs=None)
    for target in (0.3, 0.6):
        pruner.prune_to(target)
        for weight in dense_weights(net).values():
            assert float((weight == 0).double().mean()) == pytest.approx(target, abs=1 / 20)


def test_global_scope_takes_the_smallest_weights():
    net = nn.Sequential(nn.Conv2d(2, 20, 3), nn.Conv2d(20, 40, 3))
    with torch.no_grad():
        net[0].weight.sign_()
    pruner_of(net, "unstructured", example_inputs=None).prune_to(0.5)
    assert bool((net[0].weight != 0).all())
    kept = net[1].weight[net[1].weight != 0].abs()
    original = 2 * 20 * 9 + 20 * 40 * 9
    assert kept.numel() == original // 2 - 2 * 20 * 9


def test_lamp_scores_by_hand():
    scores = lamp_scores(torch.tensor([1.0, 3.0, 2.0]).double(), torch.tensor([1, 1, 2]))
    assert scores.tolist() == pytest.approx([1 / 18, 1.0, 4 / 17])
    assert lamp_scores(torch.zeros(3).double(), torch.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_lamp_does_not_see_the_scale_of_a_layer(granularity):
    kept = []
    for scale in (1.0, 2.0**-7):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 20, 3), nn.Conv2d(20, 40, 3))
        with torch.no_grad():
            net[1].weight.mul_(scale)
        pruner_of(net, granularity, score="lamp", example_inputs=None).prune_to(0.6)
        kept.append([weight != 0 for weight in dense_weights(net).values()])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))
    assert all(float(mask.double().mean()) > 0.05 for mask in kept[0])


def test_random_scores_are_a_control():
    shares = {}
    for score in ("magnitude", "random"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 20, 3), nn.Conv2d(20, 40, 3))
        total = sum(float(w.abs().sum()) for w in dense_weights(net).values())
        pruner_of(net, "unstructured", score=score, seed=1, example_inputs=None).prune_to(0.5)
        shares[score] = sum(float(w.abs().sum()) for w in dense_weights(net).values()) / total
    assert shares["random"] == pytest.approx(0.5, abs=0.05)
    assert shares["magnitude"] > 0.7
