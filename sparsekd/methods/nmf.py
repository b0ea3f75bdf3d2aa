"""Non-negative matrix factorisation of who chose what, by multiplicative updates; the input stays sparse.

Lee & Seung, Algorithms for Non-negative Matrix Factorization, NIPS 2000, theorem 1 (the Frobenius norm).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import pairs

__all__ = ["nmf"]

# To divide by at least. A row that no factor explains shrinks with every sweep, until its products with others are no
# floats any more, or so small that the quotient is infinite.
_SMALLEST = 1e-30


@torch.no_grad()
def nmf(
    users: Tensor,
    items: Tensor,
    num_users: int,
    num_items: int,
    rank: int,
    sweeps: int = 30,
    seed: int = 0,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors W [num_users, rank] and H [num_items, rank], both >= 0, with W H^T near the matrix R of who chose what.

    R is 1 where a pair of `users [M]` and `items [M]` stands, however often, and 0 elsewhere; it is never made dense.

    sweeps  of updates, of W and then of H each.
    start   (W, H) to begin with instead of random ones of R's mean.

    Raises ValueError for numbers out of range and no pairs at all, TypeError for numbers that are no integers.
    """
    users, items = pairs.checked("methods.nmf", users.cpu(), items.cpu(), num_users, num_items)
    if not len(users):
        raise ValueError("sparsekd.methods.nmf: expected who chose what, got no pairs; give those to learn from")
    index = torch.stack(pairs.once(users, items, num_items))
    ones = torch.ones(index.shape[1])
    by_user = torch.sparse_coo_tensor(index, ones, (num_users, num_items), is_coalesced=True, check_invariants=False)
    by_item = torch.sparse_coo_tensor(index.flip(0), ones, (num_items, num_users), check_invariants=False).coalesce()
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        scale = (len(ones) / (num_users * num_items) / rank) ** 0.5
        w, h = (scale * torch.randn(rows, rank, generator=generator).abs() for rows in (num_users, num_items))
    else:
        w, h = (factor.float().clone() for factor in start)
    for _ in range(sweeps):
        _update(w, by_user, h)
        _update(h, by_item, w)
    return w, h


def _update(factor: Tensor, matrix: Tensor, other: Tensor) -> None:
    below = factor @ (other.T @ other)
    factor *= torch.sparse.mm(matrix, other) / below.clamp_(min=_SMALLEST)
