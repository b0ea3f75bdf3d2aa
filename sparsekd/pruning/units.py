"""The three granularities: one class each, alike to the pruner. A unit is what stays, goes or comes back as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks import BlockPattern, BlockSparse, mask_to_index, spread, tap_major
from ..conversion import DENSE_TYPES, SPARSE_TYPES, named_layers, report, survey
from ..convert import sparsify, warn_of_unexpected
from ..nn import SparseConvTranspose2d
from .grouping import Grouping
from .scores import energies
from .surgery import drop_blocks, grow_blocks, state_slots


@dataclass(frozen=True)
class Entries:
    """What a layer stores, or could store: blocks, or single weights. All ``[entries]``, on the CPU.

    sizes: the weights in each. unit: the unit that each belongs to, numbered from 0 without gaps. worth: what each adds
    to its unit (float64).
    """

    sizes: Tensor
    unit: Tensor
    worth: Tensor

    def unit_sizes(self) -> Tensor:
        return self._unit_sizes

    def unit_counts(self) -> Tensor:
        return self._sums(torch.ones_like(self.sizes))

    def unit_worth(self) -> Tensor:
        """``[units]``: worth of a unit for each weight in it."""
        return self._sums(self.worth) / self.unit_sizes()

    @cached_property
    def _unit_sizes(self) -> Tensor:
        return self._sums(self.sizes)

    @cached_property
    def _units(self) -> int:
        return int(self.unit.max()) + 1 if len(self.unit) else 0

    def _sums(self, of_entries: Tensor) -> Tensor:
        return of_entries.new_zeros(self._units).index_add_(0, self.unit, of_entries)


class BlockUnits:
    """A block-sparse layer whose units are its blocks, or groups of them. ``theta0`` has the shape of the values.

    Scores come and masks go in the shape of :meth:`mask`.
    """

    def __init__(self, name: str, layer: Any, grouping: Grouping | None = None):
        self.name, self.layer, self.grouping = name, layer, grouping or Grouping()
        self.copies: list[Any] = []  # layers of other models that follow this one
        self.theta0: Tensor | None = None
        self.planned = self.num_kept

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.values

    @property
    def own_tensors(self) -> tuple[Tensor, ...]:
        """What changes its shape with the blocks, or is theirs."""
        return self.layer.values, self.layer.row_ptr, self.layer.col_idx

    @property
    def num_weights(self) -> int:
        return self.layer.num_weights

    @property
    def num_kept(self) -> int:
        return self.layer.num_kept

    @property
    def entry_weights(self) -> int:
        """Numbers that an entry stores, padding included."""
        return self.layer.pattern.bh * self.layer.pattern.bw

    def kept_sizes(self) -> Tensor:
        return self.layer.blocks.block_sizes().cpu()

    def kept(self, scores: Tensor | None = None) -> Entries:
        """The blocks there are, worth their energy or what the scores give a weight in them."""
        blocks = self.layer.blocks
        return self._entries(blocks, self._worth(blocks, self.mask(), scores) if scores is not None else None)

    def gone(self, scores: Tensor | None = None) -> Entries:
        """The blocks that could come back."""
        blocks, mask = self.layer.blocks, ~self.mask()
        row_ptr, col_idx = mask_to_index(mask)
        zeros = blocks.values.new_zeros(()).expand(len(col_idx), blocks.pattern.bh, blocks.pattern.bw)
        missing = replace(blocks, values=zeros, row_ptr=row_ptr, col_idx=col_idx)
        if scores is None:
            return self._entries(missing, torch.zeros(len(col_idx), dtype=torch.float64))
        return self._entries(missing, self._worth(missing, mask, scores))

    def _entries(self, blocks: BlockSparse, worth: Tensor | None) -> Entries:
        worth = energies(blocks.values) if worth is None else worth
        return Entries(blocks.block_sizes().cpu(), self._units(blocks, worth), worth)

    def _worth(self, blocks: BlockSparse, mask: Tensor, scores: Tensor) -> Tensor:
        in_order = tap_major(scores)[tap_major(mask.to(scores.device))]
        return in_order.cpu().double() * blocks.block_sizes().cpu()

    def _units(self, blocks: BlockSparse, worth: Tensor) -> Tensor:
        return self.grouping.units(blocks, worth)

    def mask_of_gone(self, entries: Tensor) -> Tensor:
        """The entries of :meth:`gone` that a bool ``[entries]`` names, as a mask."""
        gone = ~self.mask().cpu()
        picture = torch.zeros_like(gone)
        tap_major(picture)[tap_major(gone)] = entries  # a view: this writes to the picture
        return picture

    def keep(self, entries: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Drop every entry of :meth:`kept` that a bool ``[entries]`` does not name."""
        keep = entries.to(self.parameter.device)
        drop_blocks(self.layer, keep, optimizers)
        for copy in self.copies:
            copy.keep_(keep.to(copy.values.device))
        if self.theta0 is not None:
            self.theta0 = self.theta0[keep]

    def grow(self, mask: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Bring back what the mask names, as zeros: in ``theta0`` too."""
        survives = grow_blocks(self.layer, mask, optimizers)
        for copy in self.copies:
            copy.grow_(mask)
        if self.theta0 is not None:
            self.theta0 = spread(self.theta0, survives)

    def dead_outputs(self) -> Tensor:
        """Bool ``[K]``: output rows without a single kept weight."""
        return self.layer.dead_outputs()

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
        self.keep(tap_major(mask.to(self.parameter.device))[tap_major(self.mask())], optimizers)
        self.planned = self.num_kept

    def describe(self) -> dict[str, Any]:
        described = {"shape": list(self.layer.weight_shape), "pattern": str(self.layer.pattern)}
        return described | ({} if self.grouping == Grouping() else {"grouping": asdict(self.grouping)})

    def check(self) -> None:
        self.layer.blocks.validate()

    def check_copy(self, copy: Any) -> None:
        """Raise ValueError unless a layer of another model has the blocks that this one has."""
        if not isinstance(copy, type(self.layer)) or not torch.equal(copy.block_mask().cpu(), self.mask().cpu()):
            raise ValueError(
                f"Pruner.attach: layer {self.name!r} of the copy does not have the blocks that the model has; make the "
                "copy after the Pruner, and attach it before the next prune"
            )


def check_there(model: nn.Module, layers: Sequence[Any]) -> None:
    """Raise RuntimeError unless the model still has the layers of these units."""
    there = set(map(id, model.modules()))
    for units in layers:
        if id(units.layer) not in there:
            raise RuntimeError(
                f"Pruner.check: layer {units.name!r} is no longer in the model (removed, or replaced by densify or an "
                "assignment); make a new Pruner, and new optimizers"
            )


class FilterUnits(BlockUnits):
    """A block-sparse layer of pattern 1 x Cg whose units are whole output rows (a filter: R * S blocks)."""

    def _units(self, blocks: BlockSparse, worth: Tensor) -> Tensor:
        return torch.unique_consecutive(blocks.row_block().cpu(), return_inverse=True)[1]


class WeightUnits:
    """A dense layer whose units are single weights under a mask. ``theta0`` is the whole dense weight."""

    def __init__(self, name: str, layer: Any):
        self.name, self.layer = name, layer
        self.copies: list[Any] = []
        self.theta0: Tensor | None = None
        self._mask = torch.ones_like(layer.weight, dtype=torch.bool)
        self.planned = self.num_kept

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.weight

    @property
    def own_tensors(self) -> tuple[Tensor, ...]:
        return (self.layer.weight,)

    @property
    def num_weights(self) -> int:
        return self.layer.weight.numel()

    entry_weights = 1

    @property
    def num_kept(self) -> int:
        return int(self._mask.sum())

    def kept_sizes(self) -> Tensor:
        return torch.ones(self.num_kept, dtype=torch.int64)

    def kept(self, scores: Tensor | None = None) -> Entries:
        """As of ``BlockUnits``, for single weights."""
        worth = self.parameter.detach().double().square() if scores is None else scores.to(self._mask.device)
        return _single(worth[self._mask])

    def gone(self, scores: Tensor | None = None) -> Entries:
        worth = torch.zeros_like(self._mask) if scores is None else scores.to(self._mask.device)
        return _single(worth[~self._mask])

    def mask_of_gone(self, entries: Tensor) -> Tensor:
        picture = torch.zeros_like(self._mask, device="cpu")
        picture[~self._mask.cpu()] = entries
        return picture

    def keep(self, entries: Tensor, optimizers: Sequence[Optimizer]) -> None:
        kept = self._mask.clone()
        kept[self._mask] = entries.to(kept.device)
        self.restrict(kept, optimizers)

    def grow(self, mask: Tensor, optimizers: Sequence[Optimizer]) -> None:
        returns = mask.to(self._mask.device) & ~self._mask
        self._mask = self._mask | returns
        tensors = [self.parameter.data, *(each for each in (self.parameter.grad, self.theta0) if each is not None)]
        for tensor in tensors:
            tensor.masked_fill_(returns, 0)
        for slot in state_slots(self.parameter, optimizers):
            slot.tensor[returns] = slot.fresh

    def dead_outputs(self) -> Tensor:
        if isinstance(self.layer, nn.ConvTranspose2d):  # [inputs, outputs of a group, R, S]
            return ~self._mask.unflatten(0, (self.layer.groups, -1)).flatten(3).any(3).any(1).flatten()
        return ~self._mask.flatten(1).any(1)

    def always_zero(self) -> Tensor:
        return ~self._mask

    def mask(self) -> Tensor:
        return self._mask.clone()

    def restrict(self, mask: Tensor, optimizers: Sequence[Optimizer]) -> None:
        self._mask = mask.to(self.parameter.device)
        for copy in self.copies:
            copy.weight.data.masked_fill_(~self._mask.to(copy.weight.device), 0)
        if self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(~self._mask, 0)
        self.planned = int(mask.sum())

    def describe(self) -> dict[str, Any]:
        return {"shape": list(self.layer.weight.shape), "pattern": "weights"}

    def check_copy(self, copy: Any) -> None:
        if copy.weight.shape != self.layer.weight.shape:
            raise ValueError(f"Pruner.attach: layer {self.name!r} of the copy has a weight of another shape")

    def check(self) -> None:
        """Nothing beyond the held zeros: a dense weight has no structure to go wrong."""


Units = BlockUnits | WeightUnits


def _single(worth: Tensor) -> Entries:
    return Entries(torch.ones(len(worth), dtype=torch.int64), torch.arange(len(worth)), worth.cpu().double())


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
        surveyed = survey(model, BlockPattern(1, 1), include, exclude)
        warn_of_unexpected(report(surveyed))
        units: list[Units] = [WeightUnits(each.name, each.layer) for each in surveyed if each.kind]
    else:
        meant = dict(named_layers(model, (*DENSE_TYPES, *SPARSE_TYPES), include, exclude))
        if granularity == "filter":
            # The rows of a transposed convolution are its inputs: a row is no filter.
            across = (nn.ConvTranspose2d, SparseConvTranspose2d)
            exclude = [*(exclude or ()), *(name for name, layer in meant.items() if isinstance(layer, across))]
            meant = {name: layer for name, layer in meant.items() if not isinstance(layer, across)}
        _make_sparse(model, meant, granularity, pattern, include, exclude)
        kind = FilterUnits if granularity == "filter" else BlockUnits
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in meant}
        for layer in layers.values():
            if isinstance(layer, SPARSE_TYPES):
                layer.dense_while_full = True
        units = [kind(name, layer, grouping) for name, layer in layers.items() if isinstance(layer, SPARSE_TYPES)]
    units = [each for each in units if each.num_kept]
    if not units:
        raise ValueError(
            "Pruner: the model has no layer to prune; look at include and exclude, and at "
            "sparsekd.conversion_report(model), which says what stays dense and why"
        )
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
    dense = [name for name, layer in found.items() if isinstance(layer, DENSE_TYPES)]
    if include is None or dense:
        # Without `include`, sparsify leaves out grouped convolutions that the pattern does not fit.
        shape = _row_of if granularity == "filter" else pattern
        sparsify(model, shape, include=None if include is None else dense, exclude=exclude)


def _row_of(layer: Any) -> BlockPattern:
    return BlockPattern(1, layer.weight.shape[1])


def check_finite(caller: str, layers: Sequence[Units]) -> None:
    for units in layers:
        if not torch.isfinite(units.parameter).all():
            raise ValueError(
                f"{caller}: expected finite weights, got NaN or infinity in layer {units.name!r}: training has "
                "diverged; load a checkpoint from before, or lower the learning rate"
            )


def drop(layers: Sequence[Units], keep: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
    """Of each layer what is kept loses the entries that its mask does not name."""
    for units, entries in zip(layers, keep, strict=True):
        units.planned = int(units.kept_sizes()[entries].sum())
        units.keep(entries, optimizers)


def of_gone(layers: Sequence[Units], entries: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """For each layer a mask of those of its entries that are gone, and the weights in it."""
    pairs = zip(layers, entries, strict=True)
    return [(units.mask_of_gone(some), int(units.gone().sizes[some].sum())) for units, some in pairs]


def grow(layers: Sequence[Units], growth: Sequence[tuple[Tensor, int]], optimizers: Sequence[Optimizer]) -> None:
    """Brings back what ``of_gone`` names, as zeros."""
    for units, (mask, num_weights) in zip(layers, growth, strict=True):
        units.planned = units.num_kept + num_weights
        units.grow(mask, optimizers)
