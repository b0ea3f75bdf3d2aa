"""Metrics that only look at the order of scores: AUC, and recall and NDCG of a full sort.

Names in this file: N rows, U users, I items.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["auc", "best_first", "recall_and_ndcg", "segments"]


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


def best_first(scores: Tensor, seen: tuple[Tensor, Tensor]) -> Tensor:
    """All items of each user, the best first, what was seen (row, item) last: int64 [U, I] on the CPU, of [U, I]."""
    unseen = scores.float().cpu().index_put(seen, torch.tensor(-math.inf))
    # A stable sort leaves ties in the order of item numbers; topk does not promise any.
    return unseen.sort(dim=1, descending=True, stable=True).indices


def recall_and_ndcg(hits: Tensor, counts: Tensor, cutoffs: tuple[int, ...]) -> dict[str, float]:
    """recall@k and ndcg@k summed over users, of hits bool [U, ranks] and counts of held-out items [U]."""
    discounts = 1 / torch.arange(2, max(cutoffs) + 2, dtype=torch.float64).log2()  # of the ranks 1, 2, ...
    best = discounts.cumsum(0)  # DCG of a user whose first items are all hits
    sums = {}
    for cutoff in cutoffs:
        first = hits[:, :cutoff].double()
        gains = (first * discounts[: first.shape[1]]).sum(1)
        sums[f"recall@{cutoff}"] = float((first.sum(1) / counts).sum())
        sums[f"ndcg@{cutoff}"] = float((gains / best[counts.clamp(max=cutoff) - 1]).sum())
    return sums
