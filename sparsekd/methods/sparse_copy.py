"""A sparse copy of a model that goes on learning: what D2S makes of it, serves, and trains beside it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
_FOLLOWED = ("lr", "weight_decay", "momentum", "betas")  # what schedules change while training goes on


class SparseCopy:
    """The model, its pruner, and an optimizer like that of the full model, with that one's groups and state.

    Every parameter learns by the settings of the group in which the full model has its counterpart. One whose
    counterpart is in no group stays as it is, since that of the full model does.

    Args:
        full, optimizer: the full model as it is now, and what it learns by.
        share_tables: the copy reads the tables of ids of the full model, and has none of its own.
        options: of the ``Pruner``.
    """

    def __init__(self, full: nn.Module, optimizer: Optimizer, share_tables: bool, options: Mapping[str, Any]) -> None:
        tables = [module for module in full.modules() if share_tables and is_table(module)]
        memo: dict[int, Any] = {id(table): _Shared(table) for table in tables}
        self.model = model = copy.deepcopy(full, memo)
        costs = options["costs"]
        if costs is not None:  # of the full model; the copy has no tables, which nothing in it asks for
            costs.check(full)
            options = {**options, "costs": replace(costs, network=network_of(model))}
        self.pruner = Pruner(model, **options, rewindable=False)
        self._cut: set[Tensor] = (
            set()
        )  # blocks of what is a dense weight in the full model; others lie as they do there
        self._sources = self._sources_in(full)
        self._places = self._divide(optimizer)
        self.optimizer = _like(optimizer, self._places)
        self._take_over(optimizer)
        if any(p.requires_grad for p in self._judged()):  # else only layers learn that stay dense
            self.pruner.attach(self.optimizer)
        self.optimizer.zero_grad()

    def step(self, of_full: Optimizer) -> None:
        """One step, every group at the rate of that of the full model."""
        for place, group in zip(self._places, self.optimizer.param_groups, strict=True):
            theirs = of_full.param_groups[place]
            group.update({name: theirs[name] for name in _FOLLOWED if name in theirs and name in group})
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pruner.after_step()

    def follows(self, optimizer: Optimizer) -> bool:
        """Whether the full model can learn by this optimizer from now on: its groups are those that are known here."""
        groups = [{id(parameter) for parameter in group["params"]} for group in optimizer.param_groups]
        return all(
            place < len(groups) and all(id(self._sources[one]) in groups[place] for one in ours)
            for place, ours in self._places.items()
        )

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Within, every pruned layer has gradients: one that does not learn would seem worthless without."""
        asleep = [values for values in self._judged() if not values.requires_grad]
        for values in asleep:
            values.requires_grad_(True)
        try:
            yield
        finally:
            for values in asleep:
                values.requires_grad_(False)
                values.grad = None

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

    def _judged(self) -> list[Tensor]:
        return [layer.values for layer in self.pruner.layers().values()]

    def _sources_in(self, full: nn.Module) -> dict[Tensor, Tensor]:
        """Parameter -> that of the full model which it was made of, for all of the copy."""
        theirs = dict(full.named_parameters(remove_duplicate=False))
        layers = self.pruner.layers()
        sources: dict[Tensor, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            dense = f"{owner}.weight".lstrip(".") if leaf == "values" and owner in layers else name
            source = theirs.get(dense, theirs.get(name))
            if source is not None:
                sources[parameter] = source
                if dense != name and dense in theirs:
                    self._cut.add(parameter)
        return sources

    def _divide(self, optimizer: Optimizer) -> dict[int, list[Tensor]]:
        """Place of a group of the full model's optimizer -> what of the copy learns as it; the others are frozen."""
        place_of = {id(p): place for place, group in enumerate(optimizer.param_groups) for p in group["params"]}
        places: dict[int, list[Tensor]] = {}
        for parameter in self.model.parameters():
            place = place_of.get(id(self._sources.get(parameter)))
            if place is None:
                parameter.requires_grad_(False)
            elif parameter.requires_grad:
                places.setdefault(place, []).append(parameter)
        if not places:
            raise ValueError(
                "D2S: expected an optimizer of the full model's parameters, got one that holds none of those which the "
                "sparse copy learns; make it from model.parameters(), then call attach(optimizer)"
            )
        return dict(sorted(places.items()))

    def _take_over(self, optimizer: Optimizer) -> None:
        """The optimizer state of the full model, that of pruned layers in blocks."""
        layers = {layer.values: layer for layer in self.pruner.layers().values()}
        for parameter in (one for ours in self._places.values() for one in ours):
            source = self._sources[parameter]
            for key, value in optimizer.state.get(source, {}).items():
                layer = layers[parameter] if parameter in self._cut else None
                self.optimizer.state[parameter][key] = _in_blocks(value, layer, source)


def is_table(module: nn.Module) -> bool:
    """Whether it is a table of ids, which a copy may share with the full model."""
    return isinstance(module, _TABLES)


def _in_blocks(value: Any, layer: BlockSparseLayer | None, source: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if layer is None or value.shape != source.shape:
        return value.clone()
    return BlockSparse.from_dense(value.reshape(layer.matrix_shape), layer.pattern).values


def _like(optimizer: Optimizer, places: Mapping[int, list[Tensor]]) -> Optimizer:
    """One of the same kind, with the groups at these places for other parameters."""
    kind: Any = type(optimizer)
    made: Optimizer = kind([{**_settings(optimizer, place), "params": ours} for place, ours in places.items()])
    for place, group in zip(places, made.param_groups, strict=True):
        group.update(_settings(optimizer, place))
    return made


def _settings(optimizer: Optimizer, place: int) -> dict[str, Any]:
    # The names are those of the full model's parameters.
    return {key: value for key, value in optimizer.param_groups[place].items() if key not in ("params", "param_names")}


class _Shared(nn.Module):
    """A table of the full model that the sparse copy reads as it is, and does not train.

    What else the model asks of a table, such as its ``weight`` for an output that is tied to it, is the table's own,
    without a gradient.
    """

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self._full = (table,)  # in a tuple, so that torch does not register it here too

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return self._full[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Of what this module has not got itself."""
        if name == "_full":
            raise AttributeError(name)  # while it is being made
        with torch.no_grad():
            value = getattr(self._full[0], name)
        if isinstance(value, Tensor):
            return value.detach()
        return torch.no_grad()(value) if inspect.ismethod(value) else value

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy stands alone: it has the table itself."""
        return copy.deepcopy(self._full[0], memo)
