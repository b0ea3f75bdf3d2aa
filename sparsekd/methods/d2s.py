"""D2S: dense to sparse, over and over, on a stream that drifts (after Ye et al., arXiv 2010.08655).

A model that was pruned and is trained on falls behind, because its pattern is stuck. So the full model goes on
learning, and every few windows a new sparse copy is made of it, which serves and learns until the next one replaces it.
How sparse each layer is falls out of one budget over all of them.

The equations of the paper are not public; what is done here:

1. Copy the full model as it is now, with its optimizer state; as long as the stream is steady, the weights that the
   copy of before has are taken from there: they know already how to do without the others.
2. Remove blocks in several rounds, the least salient first over all layers (saliency.py), by the gradients of the
   latest batches; a floor keeps every layer alive.
3. Between and after the rounds catch up on the latest batches.
4. Serve it if it is complete and no worse than the one that serves now; until then the old one answers. A copy that
   falls behind the full model is replaced before its turn.
5. The copy learns every batch that the full model learns, and if it is wished what the full model says of it, which is
   computed anyway.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import distributed
from ..blocks import BlockPattern, BlockSparse, tap_major
from ..distill import Losses, Plain
from ..freeze import freeze
from ..modes import evaluation_mode
from ..nn import BlockSparseLayer, SparseEmbedding, SparseEmbeddingBag
from ..outputs import check_tensor, pick
from ..pruning import Budget, CostTable, Grouping, Pruner
from ..pruning.cost import network_of
from ..serving import ServingModel
from .base import Method, PruneEvent, part_of
from .rounds import Batch, in_turn, prune_event, prune_in_rounds, scored
from .saliency import CRITERIA, Criterion, saliency

__all__ = ["D2S"]

_TABLES = (nn.Embedding, nn.EmbeddingBag, SparseEmbedding, SparseEmbeddingBag)
_WATCHED = 32  # batches at the end of a window that say whether the copy falls behind


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


class D2S(Method):
    """A full model that learns a stream, and the sparse copy of it that serves.

        method = D2S(Plain(model, Click()), 0.9, every=4, example_inputs=inputs)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        method.attach(optimizer)
        for number, batches in enumerate(windows, 1):
            for inputs, target in batches:
                optimizer.zero_grad()
                method.loss(inputs, target).total.backward()
                optimizer.step()
                method.after_step()
            event = method.after_boundary(number)       # a PruneEvent where a new copy serves
        method.serving_student                          # the copy; method.serving(x) answers by its frozen form

    Args:
        distiller: a ``Plain`` full model with its goal.
        budget: what the copy does without: a share of the weights, or a ``Budget`` of weights, macs, bytes or
            latency_us (``Budget("macs", 0.9, removed=True)``).
        every, start: windows between two copies, and the window after which the first is made.
        trigger: share of the loss by which the copy may fall behind the full model at the end of a window; beyond it a
            new one is made at once. ``math.inf`` waits for its turn.
        imitation: share of the full model's answer in what the copy learns; 0 learns from the labels alone, which was
            the best on the synthetic streams: a sparse copy may be better than the full model just after a change.
        rounds: prunings on the way to the budget.
        catch_up: passes over the latest batches with which a new copy catches up.
        remember: how many of these are kept, at most those of one window.
        evolve: a copy whose turn it is takes over the weights of the one before where that has them, which is better as
            long as the stream is steady. One that is made because the copy fell behind begins from the full model.
        accept: share of the loss on the latest batches by which a new copy may be worse than the one that serves.
        criterion: what the blocks are judged by, see ``saliency``.
        share_tables: the copy reads the tables of ids of the full model while both learn, and has none of its own.
        serving: answers by the copy; swapped at a hand-over, and brought up to date at the end of every window.
        freezing: options of ``freeze`` for what serves; None serves the copy as it is.
        granularity to costs, example_inputs: as in ``Pruner``. Default scope "global".
    """

    name = "d2s"

    def __init__(
        self,
        distiller: Plain,
        budget: float | Budget,
        *,
        every: int = 4,
        start: int = 1,
        imitation: float = 0.0,
        rounds: int = 3,
        catch_up: float = 1.0,
        remember: int = 64,
        criterion: Criterion = "taylor",
        share_tables: bool = True,
        evolve: bool = True,
        trigger: float = 0.01,
        accept: float = 0.01,
        serving: ServingModel | None = None,
        freezing: Mapping[str, Any] | None = None,
        granularity: Literal["block", "filter"] = "block",
        pattern: BlockPattern | None = None,
        grouping: Grouping | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        scope: Literal["global", "cost"] = "global",
        floor: float = 0.02,
        costs: CostTable | None = None,
        example_inputs: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(distiller)
        if not isinstance(distiller, Plain):
            raise TypeError(
                f"D2S: expected Plain(model, goal), got {type(distiller).__name__}; the full model is taught"
            )
        if distributed.num_ranks() > 1:
            raise ValueError(f"D2S: a stream is learnt in one process, got {distributed.num_ranks()} ranks")
        for name, number, least in (
            ("every", every, 1),
            ("start", start, 1),
            ("rounds", rounds, 1),
            ("remember", remember, 1),
        ):
            if number < least:
                raise ValueError(f"D2S: {name} must be at least {least}, got {number}")
        if not 0.0 <= imitation <= 1.0 or not 0.0 <= catch_up < math.inf or criterion not in CRITERIA:
            raise ValueError(
                f"D2S: expected imitation in [0, 1], catch_up >= 0 and a criterion of {', '.join(CRITERIA)}, got "
                f"{imitation}, {catch_up} and {criterion!r}"
            )
        self.budget = Budget.to_remove("D2S", budget, weights=None, macs=None, bytes=None, latency_us=None)
        self.every, self.start, self.imitation = every, start, imitation
        self.rounds, self.catch_up, self.criterion = rounds, catch_up, criterion
        self.share_tables, self.serving, self.freezing = share_tables, serving, freezing
        self._options: dict[str, Any] = {"granularity": granularity, "pattern": pattern, "grouping": grouping}
        self._options |= {"include": include, "exclude": exclude, "scope": scope, "floor": floor, "costs": costs}
        self._options["example_inputs"] = example_inputs
        self.sparse: _Sparse | None = None
        self._recent: deque[Batch] = deque(maxlen=remember)
        self._optimizer: Optimizer | None = None
        self.evolve, self.trigger, self.accept = evolve, trigger, accept
        self._lag: deque[tuple[Tensor, Tensor]] = deque(maxlen=_WATCHED)
        self.handed_over = self.refused = 0  # copies that came to serve, and that were worse than the one that did
        self._check_budget()

    @property
    def serving_student(self) -> nn.Module:
        """What is scored and serves: the sparse copy; before the first one the full model."""
        return self.student if self.sparse is None else self.sparse.model

    @property
    def pruner(self) -> Pruner | None:
        return None if self.sparse is None else self.sparse.pruner

    def attach(self, optimizer: Optimizer) -> None:
        """The optimizer of the full model; the copy learns by one of the same kind, at the same rate."""
        self._optimizer = optimizer

    def loss(self, inputs: Sequence[Any], target: Tensor) -> Losses:
        """That of the full model, and of the copy: ``sad`` is 0, ``kd`` what the copy is short of the full model."""
        full = self._output(self.student, inputs)
        task = self.distiller.goal.loss(full, target)
        self._recent.append((inputs, target))
        if self.sparse is None:
            nothing = task.new_zeros(())
            return Losses(task, task.detach(), nothing, nothing)
        learnt, own, kd = self._copy_loss(self.sparse.model.train(), inputs, target, full.detach())
        self._lag.append((own, task.detach()))
        return Losses(task + learnt, task.detach(), kd, task.new_zeros(()))

    def after_step(self) -> None:
        if self.sparse is not None:
            self.sparse.step(self._attached())

    def after_boundary(self, number: int) -> PruneEvent | None:
        """At the end of a window: a new copy where it is time, and what serves is brought up to date."""
        event = None
        behind = self._falls_behind()
        if number >= self.start and ((number - self.start) % self.every == 0 or behind):
            if not self._recent:
                raise RuntimeError("D2S.after_boundary: no batch has been learnt since the last one; call loss first")
            event = self._hand_over(number, evolve=self.evolve and not behind)
        self._serve()
        self._recent.clear()
        self._lag.clear()
        return event

    def _falls_behind(self) -> bool:
        """Whether the loss of the copy has been beyond that of the full model, at the end of this window."""
        if not self._lag:
            return False
        own, full = (float(torch.stack(losses).mean()) for losses in zip(*self._lag, strict=True))
        return own > (1 + self.trigger) * full

    def standalone(self) -> nn.Module:
        """A copy of what is scored and serves, with tables of its own, in evaluation mode."""
        return copy.deepcopy(self.serving_student).eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        state = {
            **super().state_dict(),
            "handed_over": self.handed_over,
            "refused": self.refused,
            "has_copy": self.sparse is not None,
        }
        return state if self.sparse is None else state | {f"copy.{k}": v for k, v in self.sparse.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.handed_over, self.refused = state["handed_over"], state["refused"]
        self.sparse = None
        if state["has_copy"]:
            self.sparse = self._new_copy()
            self.sparse.load_state_dict(part_of(state, "copy."))

    def _describe_plan(self) -> dict[str, Any]:
        names = (
            "every",
            "start",
            "trigger",
            "accept",
            "imitation",
            "rounds",
            "catch_up",
            "criterion",
            "share_tables",
            "evolve",
        )
        plan = {name: getattr(self, name) for name in names}
        return {**super()._describe_plan(), "budget": str(self.budget), "remember": self._recent.maxlen, **plan}

    def _output(self, model: nn.Module, inputs: Sequence[Any]) -> Any:
        return check_tensor("D2S", pick("D2S", model(*inputs), self.distiller.output))

    def _copy_loss(
        self, model: nn.Module, inputs: Sequence[Any], target: Tensor, taught: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(what the copy lowers, its task loss, how far it is from the full model); only the first has a graph."""
        goal, output = self.distiller.goal, self._output(model, inputs)
        task = goal.loss(output, target)
        if taught is None or not self.imitation:
            return task, task.detach(), task.new_zeros(())
        kd = goal.imitation(output, taught, 1.0)
        return (1 - self.imitation) * task + self.imitation * kd, task.detach(), kd.detach()

    def _attached(self) -> Optimizer:
        if self._optimizer is None:
            raise RuntimeError("D2S: call attach(optimizer) before training; the copy learns as the full model does")
        return self._optimizer

    # ---- a new copy

    def _new_copy(self) -> _Sparse:
        """The full model as it is, in blocks, with nothing removed."""
        tables = [module for module in self.student.modules() if isinstance(module, _TABLES)]
        memo: dict[int, Any] = {id(table): _Shared(table) for table in tables} if self.share_tables else {}
        model = copy.deepcopy(self.student, memo)
        return _Sparse(model, self.student, self._attached(), self._options)

    def _hand_over(self, number: int, evolve: bool) -> PruneEvent | None:
        candidate = self._new_copy()
        if evolve and self.sparse is not None:
            candidate.adopt(self.sparse)
        batches = list(self._recent)
        taught: list[Tensor | None] = [None] * len(batches)
        if self.imitation:
            with evaluation_mode(self.student), torch.no_grad():
                taught = [self._output(self.student, inputs) for inputs, _ in batches]
        lessons = in_turn([(*batch, said) for batch, said in zip(batches, taught, strict=True)])

        def learn() -> None:
            inputs, target, said = next(lessons)
            self._copy_loss(candidate.model.train(), inputs, target, said)[0].backward()
            candidate.step(self._attached())

        def scores() -> dict[str, Tensor]:
            model = candidate.model.train()
            losses = (lambda i=i, t=t: self.distiller.goal.loss(self._output(model, i), t) for i, t in scored(batches))
            return saliency(candidate.pruner, losses, self.criterion)

        prune_in_rounds(candidate.pruner, self.budget, self.rounds, scores, learn, round(self.catch_up * len(batches)))
        new, old = (self._mean_loss(model, batches) for model in (candidate.model, self.serving_student))
        if not math.isfinite(new) or (self.sparse is not None and new > (1 + self.accept) * old):
            self.refused += 1
            return None
        self.sparse = candidate
        self.handed_over += 1
        return prune_event(number, "hand-over", self.budget, candidate.pruner)

    def _mean_loss(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        with evaluation_mode(model), torch.no_grad():
            losses = [float(self.distiller.goal.loss(self._output(model, i), t)) for i, t in batches]
        return sum(losses) / len(losses)

    def _serve(self) -> None:
        if self.serving is None or self.sparse is None:
            return
        network, inputs = self.standalone(), tuple(self._recent[-1][0])
        self.serving.swap(network if self.freezing is None else freeze(network, inputs, **self.freezing), inputs)

    def _check_budget(self) -> None:
        """Raise ValueError now where the first hand-over would: for a budget that a layer cannot meet."""
        model = copy.deepcopy(self.student)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first hand-over warns of layers that stay dense
            pruner = Pruner(model, **self._options, rewindable=False)
            if not (self.budget.unit == "macs" and not pruner.has_seen_example):
                pruner.prune_to(self.budget)


class _Sparse:
    """A sparse copy in training: the model, its pruner, and an optimizer like that of the full model."""

    def __init__(self, model: nn.Module, full: nn.Module, optimizer: Optimizer, options: Mapping[str, Any]) -> None:
        self.model = model
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
    def adopt(self, before: _Sparse) -> None:
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
