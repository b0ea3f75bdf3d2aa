"""What ids count in the means of their bags."""

from __future__ import annotations

import torch
from torch import Tensor

from ._schema import call, define
from .embedding import IDS, NO_BAGS, bag_of, check_ids, check_offsets


def embedding_bag_scale(ids: Tensor, offsets: Tensor, padding_idx: int | None = None) -> Tensor:
    """The ``scale`` with which ``ops.embedding_bag`` takes means: float32 ``[ids]``, of every id one over the number of
    ids in its bag, ``padding_idx`` not counted. ``offsets [bags + 1]`` as there."""
    check_ids("embedding_bag", ids)
    if ids.dim() != 1 or offsets.dim() != 1 or offsets.dtype not in IDS:
        raise ValueError(NO_BAGS.format(tuple(ids.shape), tuple(offsets.shape)))
    return call("embedding_bag_scale", ids.long(), offsets.long(), -1 if padding_idx is None else padding_idx)


def embedding_bag_scale_reference(ids: Tensor, offsets: Tensor, padding: int) -> Tensor:
    check_offsets(offsets, ids.shape[0])
    bag = bag_of(offsets, ids.shape[0])
    sizes = torch.zeros_like(offsets[1:]).index_add(0, bag, (ids != padding).long())
    return sizes.clamp(min=1).float().reciprocal()[bag]


define(
    "embedding_bag_scale",
    "(Tensor ids, Tensor offsets, SymInt padding) -> Tensor",
    embedding_bag_scale_reference,
    lambda ids, offsets, padding: ids.new_empty(ids.shape, dtype=torch.float32),
)
