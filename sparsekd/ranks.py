"""Metrics that only look at the order of scores: AUC, and recall, NDCG, hit rate and MRR of a full sort.

Names in this file: N rows, U users, I items.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["auc", "best_first", "of_hits", "segments"]


def auc(score: Tensor, target: Tensor) -> float:
    """Area under the ROC curve of float64 scores [N], from the ranks of the positive rows; ties share a middle rank."""
    _, places, counts = torch.unique(score, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[places]
    positives = float(target.sum())
    negatives = len(target) - positives
    return (float(ranks[target == 1].sum()) - positives * (positives + 1) / 2) / (positives * negatives)


def segments(offsets: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(place in `rows`, value) of everything in these rows of a table in CSR form, all on one device.

    Row u of the table is values[offsets[u] : offsets[u + 1]].
    """
    begin, count = offsets[rows], offsets[rows + 1] - offsets[rows]
    places = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    within = torch.arange(len(places), device=rows.device) - (count.cumsum(0) - count)[places]
    return places, values[begin[places] + within]


def best_first(scores: Tensor, seen: tuple[Tensor, Tensor], count: int) -> Tensor:
    """The first `count` items of each user, the best first and the smaller number first among equals; what was seen
    (row, item) comes last: int64 [U, min(count, I)] on the CPU, of [U, I]."""
    unseen = scores.float().cpu().index_put(seen, torch.tensor(-math.inf))
    count = min(count, unseen.shape[1])
    more = min(count + 1, unseen.shape[1])
    values, items = unseen.topk(more, dim=1)
    # topk promises no order among equals. Those that it took are sorted by number, then by score, which keeps that
    # order; where it left an equal of the last one out, it may have taken the wrong ones: all are sorted.
    items = items[:, :count].sort(dim=1).values
    order = unseen.gather(1, items).sort(dim=1, descending=True, stable=True).indices
    best = items.gather(1, order)
    cut = (values[:, count - 1] == values[:, more - 1]).nonzero().flatten() if more > count else items.new_empty(0)
    best[cut] = unseen[cut].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return best


def of_hits(hits: Tensor, counts: Tensor, cutoffs: tuple[int, ...]) -> dict[str, float]:
    """recall@k, ndcg@k, hr@k and mrr@k summed over users, of hits bool [U, ranks] and counts of held-out items [U]."""
    ranks = torch.arange(1, max(cutoffs) + 1, dtype=torch.float64)
    discounts = 1 / (ranks + 1).log2()
    best = discounts.cumsum(0)  # DCG of a user whose first items are all hits
    sums = {}
    for cutoff in cutoffs:
        first = hits[:, :cutoff].double()
        gains = (first * discounts[: first.shape[1]]).sum(1)
        sums[f"recall@{cutoff}"] = float((first.sum(1) / counts).sum())
        sums[f"ndcg@{cutoff}"] = float((gains / best[counts.clamp(max=cutoff) - 1]).sum())
        sums[f"hr@{cutoff}"] = float(first.amax(1).sum())
        sums[f"mrr@{cutoff}"] = float((first / ranks[: first.shape[1]]).amax(1).sum())
    return sums
