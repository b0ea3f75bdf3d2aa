"""The network left as it is, with dense layers: what a frozen one must never be slower than."""

from __future__ import annotations

import torch
from torch import nn

from ..backends import cpu
from ..nn import SparseConv2d, SparseLinear
from ..nn.embedding_table import SparseTable
from .measure import density_of
from .network import FrozenModel
from .plan import Plan
from .source import Source

DENSE = "dense, unfrozen"  # in Plan.network_us
_KEPT = (SparseConv2d, SparseLinear)  # whose blocks are those of the dense weight; others are stored dense
NOISE = 0.97  # of two networks the faster one has to be this much faster to be called so


def run_dense(source: Source, dense: nn.Module, network_us: dict[str, float]) -> FrozenModel:
    """The model with dense layers and its own forward; a file keeps the blocks of those that were block-sparse."""
    kept = {name: one.blocks for name, one in source.model.named_modules() if type(one) in _KEPT}
    density = {name: density_of(blocks) for name, blocks in kept.items()}
    tables = any(isinstance(one, SparseTable) for one in dense.modules())
    with_what = "dense layers and packed tables" if tables else "dense layers"
    note = f"the model's own forward runs, with {with_what}: it was faster than what could be made of it"
    if density:
        note += f"; its blocks (density {min(density.values()):.2g} to {max(density.values()):.2g}) are kept in files"
    plan = Plan(
        layers=(),
        memory_format="contiguous",
        threads=torch.get_num_threads(),
        isa=cpu.isa(),
        network_us=network_us,
        notes=(note, *source.said),
        eager=True,
    )
    record = {**source.record, "nodes": {}, "sites": [], "traced": "", "eager": True}
    return FrozenModel(dense, plan, record, None, kept)


__all__ = ["DENSE", "NOISE", "run_dense"]
