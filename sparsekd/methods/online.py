"""Models that are pruned once on a stream and learn on: what D2S is compared with. RigL's move their weights about."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from ..distill import Losses, Plain
from ..pruning import Budget, DenseGradients, Pruner
from ..tapped import TeacherTargets
from .base import Method, PruneEvent, part_of
from .rounds import Batch, in_turn, prune_event, prune_in_rounds, scored
from .saliency import CRITERIA, Criterion, saliency

__all__ = ["OnlinePruned"]


class OnlinePruned(Method):
    """Prunes its model after one window of a stream, and goes on learning from the labels.

    Args:
        distiller: a ``Plain`` model with its goal; its layers are replaced in place: make the optimizer afterwards.
        budget, start, rounds, catch_up, remember: as in ``D2S``, for the one time.
        criterion: as in ``D2S``, or "random": a control.
        exchange: share of the weights kept that make room for as many others, those of largest gradient, after every
            ``exchange_every`` steps; 0 leaves the pattern as it is. 0.3 and 100 are those of RigL (Evci et al., 2020),
            whose share falls with the training: a stream has no end to fall towards.
        options: of the ``Pruner``. Default scope "global" with a floor of 0.02.
    """

    name = "online-pruned"

    def __init__(
        self,
        distiller: Plain,
        budget: float | Budget,
        *,
        start: int = 1,
        rounds: int = 3,
        catch_up: float = 1.0,
        remember: int = 64,
        criterion: Criterion | Literal["random"] = "taylor",
        exchange: float = 0.0,
        exchange_every: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(distiller)
        if start < 1 or rounds < 1 or remember < 1 or exchange_every < 1 or not 0.0 <= exchange < 1.0:
            raise ValueError(
                "OnlinePruned: expected start, rounds, remember and exchange_every from 1 and exchange in [0, 1), "
                f"got {start}, {rounds}, {remember}, {exchange_every} and {exchange}"
            )
        if criterion not in (*CRITERIA, "random"):
            raise ValueError(f"OnlinePruned: criterion must be one of {', '.join(CRITERIA)}, random, got {criterion!r}")
        self.budget = Budget.to_remove("OnlinePruned", budget, weights=None, macs=None, bytes=None, latency_us=None)
        self.start, self.rounds, self.catch_up, self.criterion = start, rounds, catch_up, criterion
        self.exchange, self.exchange_every = exchange, exchange_every
        score: Literal["random", "magnitude"] = "random" if criterion == "random" else "magnitude"
        options = {"scope": "global", "floor": 0.02, **options}
        self.pruner = Pruner(distiller.student, **options, score=score, rewindable=False)
        self._recent: deque[Batch] = deque(maxlen=remember)
        self._optimizers: list[Optimizer] = []
        self._gradients: DenseGradients | None = None
        self.is_pruned = False
        self.steps = 0  # since then

    def attach(self, optimizer: Optimizer) -> None:
        self.pruner.attach(optimizer)
        self._optimizers.append(optimizer)

    def loss(self, inputs: Sequence[Any], target: Tensor, taught: TeacherTargets | None = None) -> Losses:
        if not self.is_pruned:
            self._recent.append((inputs, target))
        elif self.exchange and (self.steps + 1) % self.exchange_every == 0:
            self._gradients = DenseGradients(self.pruner)
            with self._gradients:
                return self.distiller.loss(inputs, target, taught)  # the gradients come with backward()
        return self.distiller.loss(inputs, target, taught)

    def after_step(self) -> None:
        self.pruner.after_step()
        self.steps += self.is_pruned
        if self._gradients is not None:
            self.pruner.exchange(self.exchange, self._gradients.scores())
            self._gradients = None

    def after_boundary(self, number: int) -> PruneEvent | None:
        if number != self.start:
            self._recent.clear()
            return None
        batches = list(self._recent)
        if not batches:
            raise RuntimeError("OnlinePruned.after_boundary: no batch has been learnt yet; call loss first")
        lessons = in_turn(batches)

        def learn() -> None:
            self.student.train()
            self.distiller.loss(*next(lessons)).total.backward()
            for optimizer in self._optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.pruner.after_step()

        def scores() -> dict[str, Tensor] | None:
            if self.criterion == "random":
                return None
            self.student.train()
            losses = (lambda b=batch: self.distiller.loss(*b).total for batch in scored(batches))
            return saliency(self.pruner, losses, self.criterion)

        prune_in_rounds(self.pruner, self.budget, self.rounds, scores, learn, round(self.catch_up * len(batches)))
        self.is_pruned = True
        self._recent.clear()
        return prune_event(number, "prune", self.budget, self.pruner)

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "is_pruned": self.is_pruned, "steps": self.steps}
        return state | {f"pruner.{key}": value for key, value in self.pruner.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_plan_of(state)
        self.pruner.load_state_dict(part_of(state, "pruner."))  # first: it checks before it changes anything
        super().load_state_dict(state)
        self.is_pruned, self.steps = state["is_pruned"], state["steps"]

    def _describe_plan(self) -> dict[str, Any]:
        names = ("start", "rounds", "catch_up", "criterion", "exchange", "exchange_every")
        plan = {name: getattr(self, name) for name in names}
        return {**super()._describe_plan(), "budget": str(self.budget), "remember": self._recent.maxlen, **plan}
