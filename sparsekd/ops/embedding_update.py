"""What training does to a packed table: the steps of optimizers on the entries that a batch touched, and the exchange
of entries.

``places [m]`` are kept entries by their place among the values, ascending; ``grad [m]`` are their gradients. Every op
changes the values and the state in place. ``decay`` times the value is added to the gradient first (L2), of the touched
entries alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._schema import define
from .embedding import ROWS_OF_BASE, count_kept, pack_mask, unpack_mask

OFTEN = 65535  # where counts of occurrences stop; it counts as infinitely often
_PIECE = 1 << 14  # rows whose bits are spread out at once


def embedding_sgd_reference(values: Tensor, places: Tensor, grad: Tensor, lr: float, decay: float) -> None:
    _check_places(places, values)
    before = values[places]
    values[places] = before - lr * (grad + decay * before)


def embedding_adagrad_reference(
    values: Tensor, square: Tensor, places: Tensor, grad: Tensor, lr: float, eps: float, decay: float
) -> None:
    """Duchi, Hazan, Singer 2011, as ``torch.optim.Adagrad``."""
    _check_places(places, values)
    grad = (grad + decay * values[places]).to(square.dtype)
    square[places] += grad.square()
    values[places] -= (lr * grad / (square[places].sqrt() + eps)).to(values.dtype)


def embedding_adagrad_rows_reference(
    values: Tensor, square: Tensor, kept: Tensor, base: Tensor, counts: Tensor, places: Tensor, grad: Tensor, lr: float,
    eps: float, decay: float,
) -> None:  # fmt: skip
    """Adagrad with one number for each row, the sum over steps of its mean square gradient, as in FBGEMM."""
    _check_places(places, values)
    grad = (grad + decay * values[places]).to(square.dtype)
    rows, of = rows_of(base, counts, kept, places).unique(return_inverse=True)
    sizes = square.new_zeros(rows.shape[0]).index_add(0, of, torch.ones_like(grad))
    square[rows] += square.new_zeros(rows.shape[0]).index_add(0, of, grad.square()) / sizes
    values[places] -= (lr * grad / (square[rows].sqrt() + eps)[of]).to(values.dtype)


def embedding_adam_reference(
    values: Tensor, mean: Tensor, square: Tensor, occurred: Tensor, kept: Tensor, base: Tensor, counts: Tensor,
    places: Tensor, grad: Tensor, lr: float, beta1: float, beta2: float, eps: float, decay: float,
) -> None:  # fmt: skip
    """Adam (Kingma & Ba 2015) for entries that are not in every step: their moments move in the steps that they take
    part in, and their bias is corrected by how many these were. ``occurred [rows]``: int16, bits of a uint16."""
    _check_places(places, values)
    grad = (grad + decay * values[places]).to(mean.dtype)
    rows, of = rows_of(base, counts, kept, places).unique(return_inverse=True)
    steps = ((occurred[rows].long() & OFTEN) + 1).clamp(max=OFTEN)
    occurred[rows] = steps.to(torch.int16)
    often = steps == OFTEN
    bias1, bias2 = ((1 - beta ** steps.double()).masked_fill(often, 1)[of].to(mean.dtype) for beta in (beta1, beta2))
    mean[places] += (1 - beta1) * (grad - mean[places])
    square[places] = beta2 * square[places] + (1 - beta2) * grad.square()
    step = lr / bias1 * mean[places] / ((square[places] / bias2).sqrt() + eps)
    values[places] -= step.to(values.dtype)


def embedding_magnitudes_reference(values: Tensor, kept: Tensor, base: Tensor, counts: Tensor) -> Tensor:
    """``[n]`` float32: magnitudes of the kept entries, infinite for the first largest one of each row."""
    magnitudes = values.abs().float()
    begin = 0
    for piece in kept.split(_PIECE):
        mask = unpack_mask(piece, 64 * kept.shape[1])
        count = int(mask.sum())
        dense = torch.full(mask.shape, -1.0, device=values.device)
        dense[mask] = magnitudes[begin : begin + count]
        best = torch.zeros_like(mask).scatter(1, dense.argmax(1, keepdim=True), True)
        magnitudes[begin : begin + count].masked_fill_(best[mask], float("inf"))
        begin += count
    return magnitudes


def embedding_thin_reference(kept: Tensor, base: Tensor, counts: Tensor, stays: Tensor) -> Tensor:
    """``kept`` without the entries that ``stays [n]`` (bool) does not name."""
    pieces, begin = [kept[:0]], 0
    for piece in kept.split(_PIECE):
        mask = unpack_mask(piece, 64 * kept.shape[1])
        count = int(mask.sum())
        mask[mask.clone()] = stays[begin : begin + count]
        pieces.append(pack_mask(mask))
        begin += count
    return torch.cat(pieces)


def embedding_repack_reference(
    values: Tensor, kept: Tensor, base: Tensor, counts: Tensor, new_kept: Tensor, new_base: Tensor, new_counts: Tensor,
    count: int, fresh: float,
) -> Tensor:  # fmt: skip
    """Values, or what lies as they do, of one table at their places in another one of the same shape: ``[count]``.
    Entries that are new there are ``fresh``."""
    out = values.new_full((count,), fresh)
    begin = to = 0
    for old, new in zip(kept.split(_PIECE), new_kept.split(_PIECE), strict=True):
        had, has = (unpack_mask(piece, 64 * kept.shape[1]) for piece in (old, new))
        both = had & has
        before, after = int(had.sum()), int(has.sum())
        out[to : to + after][both[has]] = values[begin : begin + before][both[had]]
        begin, to = begin + before, to + after
    return out


def rows_of(base: Tensor, counts: Tensor, kept: Tensor, places: Tensor) -> Tensor:
    """The row of each place."""
    group = torch.searchsorted(base, places, right=True) - 1
    sizes = counts.view(-1, ROWS_OF_BASE).long()
    if bool((sizes == 255).any()):
        sizes.view(-1)[: kept.shape[0]] = count_kept(kept)
    ends = sizes.cumsum(1)[group] + base[group][:, None]
    return group * ROWS_OF_BASE + (ends <= places[:, None]).sum(1)


def _check_places(places: Tensor, values: Tensor) -> None:
    if places.numel() and (
        int(places[0]) < 0 or int(places[-1]) >= values.shape[0] or bool((places[1:] <= places[:-1]).any())
    ):
        raise IndexError(f"sparsekd.optim: places must ascend in [0, {values.shape[0]}), got {places[:8].tolist()}")


_INDEX = "Tensor kept, Tensor base, Tensor counts"
_GRAD = "Tensor places, Tensor grad"


def _nothing(*_: object) -> None:
    return None


define(
    "embedding_sgd_",
    f"(Tensor(a!) values, {_GRAD}, float lr, float decay) -> ()",
    embedding_sgd_reference,
    _nothing,
)
define(
    "embedding_adagrad_",
    f"(Tensor(a!) values, Tensor(b!) square, {_GRAD}, float lr, float eps, float decay) -> ()",
    embedding_adagrad_reference,
    _nothing,
)
define(
    "embedding_adagrad_rows_",
    f"(Tensor(a!) values, Tensor(b!) square, {_INDEX}, {_GRAD}, float lr, float eps, float decay) -> ()",
    embedding_adagrad_rows_reference,
    _nothing,
)
define(
    "embedding_adam_",
    f"(Tensor(a!) values, Tensor(b!) mean, Tensor(c!) square, Tensor(d!) occurred, {_INDEX}, {_GRAD}, float lr, "
    "float beta1, float beta2, float eps, float decay) -> ()",
    embedding_adam_reference,
    _nothing,
)
define(
    "embedding_magnitudes",
    f"(Tensor values, {_INDEX}) -> Tensor",
    embedding_magnitudes_reference,
    lambda values, *_: values.new_empty(values.shape, dtype=torch.float32),
)
define(
    "embedding_thin",
    f"({_INDEX}, Tensor stays) -> Tensor",
    embedding_thin_reference,
    lambda kept, *_: torch.empty_like(kept),
)
define(
    "embedding_repack",
    f"(Tensor values, {_INDEX}, Tensor new_kept, Tensor new_base, Tensor new_counts, SymInt count, float fresh)"
    " -> Tensor",
    embedding_repack_reference,
    lambda values, kept, base, counts, new_kept, new_base, new_counts, count, fresh: values.new_empty(count),
)
