"""A sparse copy of a model that goes on learning: what D2S makes of it, serves, and trains beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks import BlockSparse, tap_major
from ..nn import BlockSparseLayer, SparseEmbedding, SparseEmbeddingBag
from ..pruning import Pruner
from ..pruning.cost import network_of
from .base import part_of

_TABLES = (nn.Embedding, nn.EmbeddingBag, SparseEmbedding, SparseEmbeddingBag)


class SparseCopy:
    """The model, its pruner, and an optimizer like that of the full model, with that one's state.

    Args:
        full, optimizer: the full model as it is now, and what it learns by.
        share_tables: the copy reads the tables of ids of the full model, and has none of its own.
        options: of the ``Pruner``.
    """

    def __init__(self, full: nn.Module, optimizer: Optimizer, share_tables: bool, options: Mapping[str, Any]) -> None:
        tables = [module for module in full.modules() if isinstance(module, _TABLES)]
        memo: dict[int, Any] = {id(table): _Shared(table) for table in tables} if share_tables else {}
        self.model = model = copy.deepcopy(full, memo)
        costs = options["costs"]
        if costs is not None:  # of the full model; the copy has no tables, which nothing in it asks for
            costs.check(full)
            options = {**options, "costs": replace(costs, network=network_of(model))}
        self.pruner = Pruner(model, **options, rewindable=False)
        self.optimizer = _like(optimizer, [p for p in model.parameters() if p.requires_grad])
        self._take_over(full, optimizer)
        self.pruner.attach(self.optimizer)
        self.optimizer.zero_grad()

    def step(self, of_full: Optimizer) -> None:
        """One step, at the rate of the full model."""
        for name in ("lr", "weight_decay"):
            if name in of_full.param_groups[0]:
                self.optimizer.param_groups[0][name] = of_full.param_groups[0][name]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pruner.after_step()

    def state_dict(self) -> dict[str, Any]:
        state = {f"pruner.{key}": value for key, value in self.pruner.state_dict().items()}
        return state | {"model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.state.clear()
        self.pruner.load_state_dict(part_of(state, "pruner."))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def adopt(self, before: SparseCopy) -> None:
        """Where the copy of before has a weight, take that one, with its optimizer state."""
        ours, theirs = dict(self.model.named_parameters()), dict(before.model.named_parameters())
        layers, of_before = self.pruner.layers(), before.pruner.layers()
        for name, parameter in ours.items():
            owner, _, leaf = name.rpartition(".")
            source: Tensor = theirs[name]
            place: Any = ...
            if owner in layers and leaf == "values":
                mask = of_before[owner].block_mask()
                place = tap_major(mask)[tap_major(layers[owner].block_mask())]
            parameter.data[place] = source.data
            for key, value in before.optimizer.state.get(source, {}).items():
                mine = self.optimizer.state[parameter].get(key)
                if isinstance(mine, Tensor) and mine.dim():
                    mine[place] = value
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(before.model.get_buffer(name))

    def _take_over(self, full: nn.Module, optimizer: Optimizer) -> None:
        """The optimizer state of the full model, that of pruned layers in blocks."""
        theirs = dict(full.named_parameters())
        layers = self.pruner.layers()
        for name, parameter in self.model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            layer = layers.get(owner) if leaf == "values" else None
            source = theirs.get(name if layer is None else f"{owner}.weight".lstrip("."))
            state = {} if source is None else optimizer.state.get(source, {})
            for key, value in state.items():
                self.optimizer.state[parameter][key] = _in_blocks(value, layer, source)


def _in_blocks(value: Any, layer: BlockSparseLayer | None, source: Tensor | None) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if layer is None or source is None or value.shape != source.shape:
        return value.clone()
    return BlockSparse.from_dense(value.reshape(layer.matrix_shape), layer.pattern).values


def _like(optimizer: Optimizer, parameters: list[Tensor]) -> Optimizer:
    """One of the same kind for other parameters."""
    kind: Any = type(optimizer)
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    made: Optimizer = kind(parameters)
    made.param_groups[0].update(settings)
    return made


class _Shared(nn.Module):
    """A table of the full model that the sparse copy reads as it is, and does not train."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple, so that torch does not register it here too

    @property
    def table(self) -> nn.Module:
        return self._table[0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return self.table(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy stands alone: it has the table itself."""
        return copy.deepcopy(self.table, memo)
