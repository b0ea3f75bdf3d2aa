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
4. Compare it with the one that serves: both learn the next window, and are scored on every batch before they learn it.
   The better one serves from then on. Which of the two serves meanwhile is what the comparison before has said: the
   newer one where new copies have been better of late, as on a stream that moves, else the older one.
5. A copy that falls behind the full model is replaced at once, before its turn.
6. The copy learns every batch that the full model learns, and if it is wished what the full model says of it, which is
   computed anyway.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import distributed
from ..blocks import BlockPattern
from ..distill import Losses, Plain
from ..freeze import freeze
from ..freeze.call import Example
from ..modes import evaluation_mode
from ..outputs import check_tensor, pick
from ..pruning import Budget, CostTable, Grouping, Pruner
from ..serving import ServingModel
from ..tapped import TeacherTargets, check_inputs
from .base import Method, PruneEvent, part_of
from .rounds import Batch, in_turn, prune_event, prune_in_rounds, scored
from .saliency import CRITERIA, Criterion, saliency
from .sparse_copy import SparseCopy, is_table

__all__ = ["D2S"]

_COPIES = ("sparse", "beside")
_COUNTED = ("handed_over", "refused", "newer_is_beside", "newer_was_better")
_WATCHED = 32  # batches at the end of a window that say whether the copy falls behind


class D2S(Method):
    """A full model that learns a stream, and the sparse copy of it that serves::

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
            new one is made and serves at once. ``math.inf`` waits for its turn.
        imitation: share of the full model's answer in what the copy learns; 0 learns from the labels alone, which was
            the best on the synthetic streams: a sparse copy may be better than the full model just after a change.
        rounds: prunings on the way to the budget.
        catch_up: passes over the latest batches with which a new copy catches up.
        remember: how many of these are kept, at most those of one window.
        evolve: a copy whose turn it is takes over the weights of the one before where that has them, which is better as
            long as the stream is steady. One that is made because the copy fell behind begins from the full model.
        accept: share of the loss on the latest batches by which a new copy that is to serve at once may be worse than
            the one that does.
        compare: a new copy and the one before learn one window side by side, and the better one stays. Where this is
            off, every new copy that ``accept`` lets pass serves at once, for good.
        criterion: what the blocks are judged by, see ``saliency``.
        share_tables: the copy reads the tables of ids of the full model while both learn, and has none of its own.
            What else the model does with a table, such as ``x @ table.weight.T``, reads it without a gradient, too.
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
        compare: bool = True,
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
        example_inputs: Example | None = None,
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
        self.sparse: SparseCopy | None = None
        self.beside: SparseCopy | None = None  # what it is compared with in this window
        self.newer_is_beside = self.newer_was_better = False
        self._recent: deque[Batch] = deque(maxlen=remember)
        self._optimizer: Optimizer | None = None
        self.evolve, self.trigger, self.accept, self.compare = evolve, trigger, accept, compare
        self._lag: deque[Tensor] = deque(maxlen=_WATCHED)  # losses: of the full model, the copy, the one beside it
        self._sum: Tensor | float = 0.0  # of all of them in this window
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
        """The optimizer of the full model; the copy learns by one of the same kind, with the same groups of parameters,
        each at the rate that its group has at every step.

        What the optimizer does not hold stays in the copy as it was in the full model. Raises ValueError where there is
        a copy already and the groups hold other parameters than those that it was made with.
        """
        if any(one is not None and not one.follows(optimizer) for one in (self.sparse, self.beside)):
            raise ValueError(
                "D2S.attach: expected an optimizer with the groups of parameters of the one before, by which the "
                f"sparse copy learns, got {len(optimizer.param_groups)} other group(s); attach it before the first "
                "window"
            )
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        left_out = [
            name
            for name, parameter in self.student.named_parameters()
            if parameter.requires_grad and id(parameter) not in held and not self._is_shared(name)
        ]
        if left_out:
            warnings.warn(
                f"D2S.attach: the optimizer does not hold {', '.join(left_out)}, which the sparse copy will not learn "
                "either; give it a group for them, or say so by requires_grad_(False)",
                stacklevel=2,
            )
        self._optimizer = optimizer

    def loss(self, inputs: Sequence[Any], target: Tensor, taught: TeacherTargets | None = None) -> Losses:
        """That of the full model, and of the copy: ``sad`` is 0, ``kd`` what the copy is short of the full model.

        ``taught`` is not looked at: the teacher of the copy is the full model, which learns.
        """
        check_inputs("D2S.loss", inputs)
        full = self._output(self.student, inputs)
        task = self.distiller.goal.loss(full, target)
        self._recent.append((inputs, target))
        if self.sparse is None:
            nothing = task.new_zeros(())
            return Losses(task, task.detach(), nothing, nothing)
        learnt, own, kd = self._copy_loss(self.sparse.model.train(), inputs, target, full.detach())
        losses = [task.detach(), own]
        if self.beside is not None:
            also, other, _ = self._copy_loss(self.beside.model.train(), inputs, target, full.detach())
            learnt = learnt + also
            losses.append(other)
        self._lag.append(torch.stack(losses))
        self._sum = self._sum + self._lag[-1]
        return Losses(task + learnt, task.detach(), kd, task.new_zeros(()))

    def after_step(self) -> None:
        for one in (self.sparse, self.beside):
            if one is not None:
                one.step(self._attached())

    def after_boundary(self, number: int) -> PruneEvent | None:
        """At the end of a window: a new copy where it is time, and what serves is brought up to date.

        Raises RuntimeError for a window without a batch, ValueError where weights of the full model are not finite.
        """
        if not self._recent:
            raise RuntimeError("D2S.after_boundary: no batch has been learnt since the last one; call loss first")
        event = self._end_comparison(number)
        behind = self._falls_behind()
        if number >= self.start and ((number - self.start) % self.every == 0 or behind):
            self._check_finite()
            event = self._hand_over(number, behind) or event
        self._serve()
        self._recent.clear()
        self._lag.clear()
        self._sum = 0.0
        return event

    def _end_comparison(self, number: int) -> PruneEvent | None:
        """Keeps the better of the two copies that have learnt this window; an event where that is another one now."""
        if self.sparse is None or self.beside is None or not self._lag:
            return None
        _, own, other = torch.as_tensor(self._sum).tolist()
        changes = other < own or not math.isfinite(own)
        self.newer_was_better = changes == self.newer_is_beside
        if changes:
            self.sparse, self.beside = self.beside, self.sparse
            self._lag = deque((losses[[0, 2, 1]] for losses in self._lag), maxlen=_WATCHED)
        self.beside = None
        self.handed_over += changes and self.newer_was_better
        self.refused += not self.newer_was_better
        stage = "hand-over" if self.newer_was_better else "hand-back"
        return prune_event(number, stage, self.budget, self.sparse.pruner) if changes else None

    def _falls_behind(self) -> bool:
        """Whether the loss of the copy has been beyond that of the full model, at the end of this window."""
        if not self._lag:
            return False
        full, own = torch.stack([losses[:2] for losses in self._lag]).mean(0).tolist()
        return own > (1 + self.trigger) * full

    def standalone(self) -> nn.Module:
        """A copy of what is scored and serves, with tables of its own, in evaluation mode."""
        return copy.deepcopy(self.serving_student).eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {name: getattr(self, name) for name in _COUNTED}
        for name in _COPIES:
            one = getattr(self, name)
            state[f"has_{name}"] = one is not None
            state |= {} if one is None else {f"{name}.{key}": value for key, value in one.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in _COUNTED:
            setattr(self, name, state[name])
        for name in _COPIES:
            one = self._new_copy() if state[f"has_{name}"] else None
            if one is not None:
                one.load_state_dict(part_of(state, f"{name}."))
            setattr(self, name, one)

    def _describe_plan(self) -> dict[str, Any]:
        names = (
            "every",
            "start",
            "trigger",
            "accept",
            "compare",
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

    def _is_shared(self, name: str) -> bool:
        """Whether a parameter of the full model is that of a table which the copy has not got."""
        return self.share_tables and is_table(self.student.get_submodule(name.rpartition(".")[0]))

    def _check_finite(self) -> None:
        for name, parameter in self.student.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(
                    f"D2S.after_boundary: expected finite weights of the full model, got NaN or infinity in {name}; no "
                    "copy is made of it: lower the learning rate, and go on from a state before the divergence"
                )

    # ---- a new copy

    def _new_copy(self) -> SparseCopy:
        """The full model as it is, in blocks, with nothing removed."""
        return SparseCopy(self.student, self._attached(), self.share_tables, self._options)

    def _hand_over(self, number: int, behind: bool) -> PruneEvent | None:
        candidate = self._new_copy()
        if self.evolve and not behind and self.sparse is not None:
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
            with candidate.judged():
                return saliency(candidate.pruner, losses, self.criterion)

        prune_in_rounds(candidate.pruner, self.budget, self.rounds, scores, learn, round(self.catch_up * len(batches)))
        if self.sparse is None or behind or self.newer_was_better or not self.compare:
            return self._serves_at_once(candidate, number, batches)
        self.beside, self.newer_is_beside = candidate, True
        return None

    def _serves_at_once(self, candidate: SparseCopy, number: int, batches: Sequence[Batch]) -> PruneEvent | None:
        new, old = (self._mean_loss(model, batches) for model in (candidate.model, self.serving_student))
        if not math.isfinite(new) or (self.sparse is not None and new > (1 + self.accept) * old):
            self.refused += 1
            return None
        if self.compare:
            self.beside, self.newer_is_beside = self.sparse, False
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
