"""The three granularities: one class each, alike to the pruner. A unit is what stays or goes as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks import BlockPattern
from ..convert import DENSE_TYPES, SPARSE_TYPES, named_layers, sparsify
from .grouping import Grouping
from .scores import energies
from .surgery import drop_blocks


class BlockUnits:
    """A block-sparse layer whose units are its blocks, or groups of them. ``theta0`` has the shape of the values.

    An *entry* is what is stored or not: a block here, a weight in ``WeightUnits``.
    """

    def __init__(self, name: str, layer: Any, grouping: Grouping | None = None):
        self.name, self.layer, self.grouping = name, layer, grouping or Grouping()
        self.own_names = {f"{name}.{tensor}".lstrip(".") for tensor in ("values", "row_ptr", "col_idx")}
        self.theta0: Tensor | None = None
        self.planned = self.num_kept

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.values

    @property
    def num_weights(self) -> int:
        return self.layer.num_weights

    @property
    def num_kept(self) -> int:
        return self.layer.num_kept

    def sizes(self) -> Tensor:
        return _sums(self.entry_sizes(), self.units_of_entries())

    def magnitudes(self) -> Tensor:
        """``[units]``: root mean square of a unit's weights, as ``magnitude_scores`` of a block."""
        return (_sums(energies(self.layer), self.units_of_entries()) / self.sizes()).sqrt()

    def entry_sizes(self) -> Tensor:
        return self.layer.blocks.block_sizes().cpu()

    def units_of_entries(self) -> Tensor:
        """``[entries]``: the unit that each belongs to."""
        return self.grouping.units(self.layer.blocks)

    def keep(self, entries: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Drop every entry that ``entries`` (bool) does not name."""
        self._keep_blocks(entries, optimizers)

    def _keep_blocks(self, keep: Tensor, optimizers: Sequence[Optimizer]) -> None:
        keep = keep.to(self.parameter.device)
        drop_blocks(self.layer, keep, optimizers)
        if self.theta0 is not None:
            self.theta0 = self.theta0[keep]

    def dead_outputs(self) -> Tensor:
        """Bool ``[K]``: output rows without a single kept weight."""
        row_ptr, pattern = self.layer.row_ptr, self.layer.pattern
        return (row_ptr[1:] == row_ptr[:-1]).repeat_interleave(pattern.bh)[: self.layer.weight_shape[0]]

    def always_zero(self) -> Tensor:
        """Bool, the values' shape: the padding of ragged blocks."""
        blocks = self.layer.blocks
        bh, bw = blocks.pattern.bh, blocks.pattern.bw
        device = blocks.values.device
        rows = blocks.row_block()[:, None] * bh + torch.arange(bh, device=device)
        cols = (blocks.col_idx.long() % blocks.pattern.grid(blocks.shape)[1])[:, None] * bw
        cols = cols + torch.arange(bw, device=device)
        return (rows >= blocks.shape[0])[:, :, None] | (cols >= blocks.shape[1])[:, None, :]

    def mask(self) -> Tensor:
        return self.layer.block_mask()

    def restrict(self, mask: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Keep the blocks that the block mask names (a subset of those kept now)."""
        rows = mask.flatten(2) if mask.dim() == 4 else mask[:, :, None]  # [Rb, Cb, R * S]
        in_order = rows.transpose(1, 2).flatten(1).to(self.parameter.device)  # columns as in col_idx
        keep = in_order[self.layer.blocks.row_block(), self.layer.col_idx.long()]
        self._keep_blocks(keep, optimizers)
        self.planned = self.num_kept

    def describe(self) -> dict[str, Any]:
        described = {"shape": list(self.layer.weight_shape), "pattern": str(self.layer.pattern)}
        return described | ({} if self.grouping == Grouping() else {"grouping": asdict(self.grouping)})

    def check(self) -> None:
        self.layer.blocks.validate()


class FilterUnits(BlockUnits):
    """A block-sparse layer of pattern 1 x Cg whose units are whole output rows (a filter: R * S blocks)."""

    def units_of_entries(self) -> Tensor:
        """``[nnzb]``: which of the rows still alive each block belongs to."""
        return torch.unique_consecutive(self.layer.blocks.row_block().cpu(), return_inverse=True)[1]


class WeightUnits:
    """A dense layer whose units are single weights under a mask. ``theta0`` is the whole dense weight."""

    def __init__(self, name: str, layer: Any):
        self.name, self.layer = name, layer
        self.own_names = {f"{name}.weight".lstrip(".")}
        self.theta0: Tensor | None = None
        self._mask = torch.ones_like(layer.weight, dtype=torch.bool)
        self.planned = self.num_kept

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.weight

    @property
    def num_weights(self) -> int:
        return self.layer.weight.numel()

    @property
    def num_kept(self) -> int:
        return int(self._mask.sum())

    def sizes(self) -> Tensor:
        return torch.ones(self.num_kept, dtype=torch.int64)

    def magnitudes(self) -> Tensor:
        return self.parameter.detach()[self._mask].cpu().double().abs()

    def entry_sizes(self) -> Tensor:
        return self.sizes()

    def units_of_entries(self) -> Tensor:
        return torch.arange(self.num_kept)

    def keep(self, entries: Tensor, optimizers: Sequence[Optimizer]) -> None:
        kept = self._mask.clone()
        kept[self._mask] = entries.to(kept.device)
        self.restrict(kept, optimizers)

    def dead_outputs(self) -> Tensor:
        return ~self._mask.flatten(1).any(1)

    def always_zero(self) -> Tensor:
        return ~self._mask

    def mask(self) -> Tensor:
        return self._mask.clone()

    def restrict(self, mask: Tensor, optimizers: Sequence[Optimizer]) -> None:
        self._mask = mask.to(self.parameter.device)
        if self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(~self._mask, 0)
        self.planned = int(mask.sum())

    def describe(self) -> dict[str, Any]:
        return {"shape": list(self.layer.weight.shape), "pattern": "weights"}

    def check(self) -> None:
        """Nothing beyond the held zeros: a dense weight has no structure to go wrong."""


Units = BlockUnits | WeightUnits


def _sums(of_entries: Tensor, unit: Tensor) -> Tensor:
    """``[units]``: what the entries of each unit add up to."""
    return of_entries.new_zeros(int(unit.max()) + 1 if len(unit) else 0).index_add_(0, unit, of_entries)


def prunable_layers(
    model: nn.Module,
    granularity: str,
    pattern: BlockPattern | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    grouping: Grouping | None = None,
) -> list[Units]:
    """The layers to prune, converted in place as the granularity needs it. Layers that are sparse already stay so."""
    if granularity == "unstructured":
        units: list[Units] = [WeightUnits(n, m) for n, m in named_layers(model, DENSE_TYPES, include, exclude)]
    else:
        found = dict(named_layers(model, (*DENSE_TYPES, *SPARSE_TYPES), include, exclude))
        _make_sparse(model, found, granularity, pattern, include, exclude)
        kind = FilterUnits if granularity == "filter" else BlockUnits
        layers = {name: model.get_submodule(name) for name in found}
        units = [kind(name, layer, grouping) for name, layer in layers.items() if isinstance(layer, SPARSE_TYPES)]
    units = [each for each in units if each.num_kept]
    if not units:
        raise ValueError("Pruner: the model has no Linear or Conv2d layer to prune; look at include and exclude")
    return units


def _make_sparse(
    model: nn.Module,
    found: dict[str, nn.Module],
    granularity: str,
    pattern: BlockPattern | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> None:
    for name, layer in found.items():
        if granularity == "filter" and isinstance(layer, SPARSE_TYPES) and layer.pattern.bh != 1:
            raise ValueError(
                f"Pruner: layer {name!r} is block-sparse with pattern {layer.pattern}, whose blocks span several "
                "filters; densify(model) first, or use granularity 'block'"
            )
    dense: dict[str, Any] = {name: layer for name, layer in found.items() if isinstance(layer, DENSE_TYPES)}
    if granularity == "filter":
        for name, layer in dense.items():
            sparsify(model, BlockPattern(1, layer.weight.shape[1]), include=[name])
    elif include is None or dense:
        # Without `include`, sparsify leaves out grouped convolutions that the pattern does not fit.
        sparsify(model, pattern, include=None if include is None else list(dense), exclude=exclude)
