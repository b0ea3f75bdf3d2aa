"""What SP-SAD, LTH-SAD and SS-SAD share: stages of training, each with its schedule, and survivors that rewind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from ..blocks import BlockPattern
from ..distill import Distiller, Losses, Plain
from ..freeze.call import Example
from ..pruning import Budget, CostTable, Grouping, Pruner, Schedule
from ..pruning.schedule import described
from ..tapped import TeacherTargets
from .base import Method, PruneEvent, part_of
from .first_scores import FIRST_SCORES, FirstScore, first_scores


@dataclass(frozen=True)
class Stage:
    """A span of training. ``"ticket"`` trains on the task alone, ``"distil"`` with the teacher."""

    name: Literal["ticket", "distil"]
    epochs: int
    schedule: Schedule
    rewinds: bool  # whether survivors go back to theta0 at every prune


class Round(NamedTuple):
    """Epochs ``first .. last`` (from 1, inclusive) of a stage that no rewinding interrupts: one learning-rate cycle."""

    stage: str
    first: int
    last: int


class Staged(Method):
    """A student under distillation and pruning, in stages, for use in any training loop::

        method = LTHSAD(distiller, LinearSchedule(rate=0.05, every=4, final=0.55), epochs=60)
        optimizer = SGD([*student.parameters(), *method.parameters()], lr=0.05, momentum=0.9)
        method.attach(optimizer)
        method.before_training(batches)                 # prunes where the schedule has first=0
        for epoch in range(1, method.epochs + 1):
            for inputs, target in batches:              # inputs: a tuple
                optimizer.zero_grad()
                method.loss(inputs, target).total.backward()
                optimizer.step()
                method.after_step()
            event = method.after_boundary(epoch)        # a PruneEvent or None

    Args:
        distiller: as in ``Method``; its student's layers are replaced in place: make the optimizer after the method.
        schedule: what is removed when, in the unit that it counts, multiply-adds by default; ``final`` must be reached
            before the last epoch. For a student that is pruned already its ``start`` is the share that is gone. One
            with absolute numbers needs to know what the dense student costs: of ``macs`` give ``example_inputs``, of
            ``latency_us`` ``costs``.
        epochs: length of the whole training, in boundaries: of a stream, its windows.
        granularity, pattern, grouping, include, exclude, score, seed, floor, costs: as in ``Pruner``.
        scope: as in ``Pruner``, but ``"cost"`` by default. The paper removes the same share of every ``"layer"`` in
            SP-SAD, and compares blocks of the whole student (``"global"``) in the others; it counts weights.
        example_inputs: as in ``Pruner``; default: the inputs of the first loss.
        rewind: ``"all"`` sets the whole student back at a prune, ``"weights"`` only the surviving weights of the pruned
            layers (biases, batch norm and unpruned layers go on). For methods that rewind.
        rewind_to: boundary whose state is theta0; 0 is the student as given (the paper), 1 or 2 is late rewinding.
        first_score: of a schedule that prunes before the first step, what judges the units then: "snip", "taylor" or
            "fisher", saliencies of some batches (see ``saliency``). Default: ``score``, of weights that have learnt
            nothing.

    A loop that changes the learning rate asks ``round(epoch)``; ``stage`` says whether the teacher takes part.
    """

    _first_schedule: ClassVar[str] = "the schedule"  # the argument that says what the first stage removes

    def __init__(
        self,
        distiller: Distiller | Plain,
        schedule: Schedule,
        *,
        epochs: int,
        granularity: Literal["block", "filter", "unstructured"] = "block",
        pattern: BlockPattern | None = None,
        grouping: Grouping | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        scope: Literal["global", "layer", "cost"] = "cost",
        score: Literal["magnitude", "lamp", "random"] | None = None,
        seed: int = 0,
        floor: float | None = None,
        costs: CostTable | None = None,
        example_inputs: Example | None = None,
        rewind: Literal["all", "weights"] = "all",
        rewind_to: int = 0,
        first_score: FirstScore | None = None,
    ) -> None:
        super().__init__(distiller)
        self.epochs, self.rewind, self.rewind_to, self.first_score = epochs, rewind, rewind_to, first_score
        if not schedule.is_absolute:  # of another the pruner says what it means
            self._set_plan(schedule)
        self.boundary = 0  # number of the latest boundary that was passed
        self._target = 0.0  # share of the latest prune
        self._begun = False  # whether a step or a boundary has been, here or before the state that was loaded
        self.pruner = Pruner(
            distiller.student,
            granularity=granularity,
            pattern=pattern,
            grouping=grouping,
            include=include,
            exclude=exclude,
            scope=scope,
            score=score,
            seed=seed,
            floor=floor,
            costs=costs,
            example_inputs=example_inputs,
            rewindable=False,
        )
        if schedule.is_absolute:
            self._set_plan(self._in_shares(schedule))
        self._check_floors()
        if any(stage.rewinds for stage in self.stages):
            self.pruner.snapshot()

    def _set_plan(self, schedule: Schedule) -> None:
        self.stages = self._plan(schedule, self.epochs)
        self._check_plan()

    def _in_shares(self, schedule: Schedule) -> Schedule:
        """The schedule in shares of what the dense student costs."""
        return schedule.in_shares(self.pruner.cost(schedule.unit)[0]) if schedule.is_absolute else schedule

    def _plan(self, schedule: Schedule, epochs: int) -> list[Stage]:
        """The stages of this method, one after the other, ``epochs`` long together."""
        raise NotImplementedError

    @property
    def stage(self) -> str:
        """Name of the stage that the running epoch belongs to (the one after the last boundary)."""
        return self._stage_of(min(self.boundary + 1, self.epochs))[0].name

    def __str__(self) -> str:
        return f"{self.name}: {self.pruner}"

    def attach(self, optimizer: Optimizer) -> None:
        """Shrink this optimizer's state along with the weights (see ``Pruner.attach``)."""
        self.pruner.attach(optimizer)

    def loss(self, inputs: Sequence[Any], target: Tensor, taught: TeacherTargets | None = None) -> Losses:
        """``Distiller.loss`` of the running stage; in stage ``"ticket"`` the teacher is not run, nor looked at.

        Raises RuntimeError where :meth:`before_training` should have come first."""
        if self._prunes_first and not self._target:
            raise RuntimeError(
                f"{type(self).__name__}.loss: the schedule prunes before the first step; call before_training() after "
                "attach(optimizer)"
            )
        return self._loss(inputs, target, taught)

    def _loss(self, inputs: Sequence[Any], target: Tensor, taught: TeacherTargets | None = None) -> Losses:
        if not self.pruner.has_seen_example and isinstance(inputs, (tuple, list)):
            self._observe(inputs)
        self._begin()
        learner = self.distiller
        return learner.loss(inputs, target, taught) if self.stage == "distil" else learner.task_loss(inputs, target)

    def after_step(self) -> None:
        """Call after every ``optimizer.step()``: what is gone stays gone."""
        self.pruner.after_step()

    def _observe(self, inputs: Sequence[Any]) -> None:
        self.pruner.observe(*inputs)
        self._check_floors()

    def before_training(self, batches: Iterable[Sequence[Any]] = ()) -> PruneEvent | None:
        """Call before the first step: prunes where the schedule has ``first=0``, and does nothing else.

        batches: each what ``loss`` takes, ``(inputs, target)`` or ``(inputs, target, taught)``. With a ``first_score``
            all of them are read: give a few. Without, at most the first, which does for ``example_inputs``. The student
            learns nothing from them. On several ranks each gives its own.

        Raises RuntimeError before ``attach``, and ValueError where a ``first_score`` has no batches, or no gradient
        reaches a layer: behind a last layer of zeros the task has none, and a stage without a teacher no other.
        """
        if not self._prunes_first or self._target:
            return None
        self._check_attached("before_training")
        stage, scores, batches = self.stages[0], None, iter(batches)
        if not self.pruner.has_seen_example and (example := next(batches, None)) is not None:
            self._observe(example[0])
            batches = chain([example], batches)
        self._begin()
        if self.first_score is not None:
            scores = first_scores(self.pruner, self.distiller, self._loss, batches, self.first_score)
        return self._prune(0, stage, stage.schedule.removed_after(0), scores)

    def after_boundary(self, number: int) -> PruneEvent | None:
        """Call at the end of every epoch or window: prunes, and rewinds, where the schedule says so.

        Raises ValueError for a number outside ``1 .. epochs`` and RuntimeError before ``attach``.
        """
        stage, first = self._stage_of(number)
        self._check_attached("after_boundary")
        self._begin()
        self.boundary = number
        if number == self.rewind_to:
            self.pruner.snapshot()
        target = _target_after(stage, number - first + 1)
        return self._prune(number, stage, target) if target > self._target else None

    def _prune(self, number: int, stage: Stage, target: float, scores: dict[str, Tensor] | None = None) -> PruneEvent:
        self.pruner.prune_to(Budget(stage.schedule.unit, target, removed=True), scores)
        if stage.rewinds:
            self.pruner.rewind(weights_only=self.rewind == "weights")
        else:
            self.pruner.reset_momentum()
        self._target = target
        pruner = self.pruner
        counts = (pruner.removed_share, pruner.num_kept, pruner.num_dead_parameters)
        return PruneEvent(
            number,
            stage.name,
            target,
            *counts,
            rewound=stage.rewinds,
            unit=stage.schedule.unit,
            macs=None if pruner.macs is None else pruner.macs[1],
            removed_macs=None if pruner.macs is None else 1.0 - pruner.macs[1] / pruner.macs[0],
            predicted_us=None if pruner.predicted_us is None else pruner.predicted_us[1],
        )

    def round(self, epoch: int) -> Round:
        """The round that ``epoch`` lies in. Restart the learning rate with it, as iterative pruning does; or do not."""
        stage, first = self._stage_of(epoch)
        last = first + stage.epochs - 1
        if stage.rewinds:
            for prune in _prune_epochs(stage, first):
                first, last = (prune + 1, last) if prune < epoch else (first, min(last, prune))
        return Round(stage.name, first, last)

    def prunes(self) -> list[tuple[int, float]]:
        """(epoch, share removed, in the schedule's unit) of every prune of the plan; it comes after that epoch."""
        planned, removed = [], 0.0
        if self._prunes_first:
            removed = self.stages[0].schedule.removed_after(0)
            planned.append((0, removed))
        for epoch in range(1, self.epochs + 1):
            stage, first = self._stage_of(epoch)
            target = _target_after(stage, epoch - first + 1)
            if target > removed:
                planned.append((epoch, target))
                removed = target
        return planned

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "boundary": self.boundary, "target": self._target}
        return state | {f"pruner.{key}": value for key, value in self.pruner.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_plan_of(state)
        # The pruner first: it checks before it changes anything.
        self.pruner.load_state_dict(part_of(state, "pruner."))
        super().load_state_dict(state)
        self.boundary, self._target, self._begun = state["boundary"], state["target"], True

    @property
    def _prunes_first(self) -> bool:
        """Whether the first prune comes before the first step."""
        return self.stages[0].schedule.first_prune == 0

    def _check_attached(self, caller: str) -> None:
        unattached = self.pruner.unattached()
        if unattached:
            raise RuntimeError(
                f"{type(self).__name__}.{caller}: no attached optimizer holds the weights of "
                f"{', '.join(unattached)}; call attach(optimizer) before training"
            )

    def _stage_of(self, epoch: int) -> tuple[Stage, int]:
        """(stage, its first epoch) of an epoch."""
        first = 1
        for stage in self.stages:
            if first <= epoch < first + stage.epochs:
                return stage, first
            first += stage.epochs
        raise ValueError(f"{type(self).__name__}: epochs go from 1 to {self.epochs}, got {epoch}")

    def _check_plan(self) -> None:
        if self.rewind not in ("all", "weights"):
            raise ValueError(f"{type(self).__name__}: rewind must be 'all' or 'weights', got {self.rewind!r}")
        for stage in self.stages:
            stage.schedule.check_reaches(stage.epochs)
        first_prune = self.stages[0].schedule.first_prune
        if self.rewind_to and not any(stage.rewinds for stage in self.stages):
            raise ValueError(f"{type(self).__name__}: survivors keep their values, got rewind_to={self.rewind_to}")
        if not 0 <= self.rewind_to < max(first_prune, 1):
            raise ValueError(
                f"{type(self).__name__}: rewind_to must come before the first prune, after epoch {first_prune}, "
                f"got {self.rewind_to}"
            )
        if self.first_score not in (None, *FIRST_SCORES):
            raise ValueError(
                f"{type(self).__name__}: first_score must be one of {', '.join(FIRST_SCORES)}, or None for score, got "
                f"{self.first_score!r}"
            )
        if self.first_score is not None and not self._prunes_first:
            raise ValueError(
                f"{type(self).__name__}: first_score={self.first_score!r} judges a prune before the first step, but "
                f"the first one comes after epoch {first_prune}; give the schedule first=0, or leave first_score out"
            )

    def _check_floors(self) -> None:
        """Refuses before the training what a prune would refuse in it; ``macs`` are known with the first example."""
        for stage in self.stages:
            target = Budget(stage.schedule.unit, stage.schedule.removed_after(stage.epochs), removed=True)
            if target.unit == "macs" and not self.pruner.has_seen_example:
                return
            self.pruner.check_reachable(target)

    def _begin(self) -> None:
        """Refuses a next prune to less than is gone already, of a student that was pruned before the training. Asked
        when a training begins and not when it goes on from a state."""
        unit = self.stages[0].schedule.unit
        if self._begun or (unit == "macs" and not self.pruner.has_seen_example):
            return
        self._begun = True
        epoch, share = next(((epoch, share) for epoch, share in self.prunes() if share > self._target), (0, 0.0))
        target = Budget(unit, share, removed=True)
        if share and self.pruner.is_past(target):
            dense, now = self.pruner.cost(unit)
            raise ValueError(
                f"{type(self).__name__}: the student is at {target.amount(now, dense)} already, and the first prune, "
                f"after epoch {epoch}, is to {share:.4g}: what is gone does not come back; give "
                f"{self._first_schedule} start={1.0 - now / dense:.4g} and targets above that, or a student of which "
                "less is gone"
            )

    def _describe_plan(self) -> dict[str, Any]:
        stages = [{**vars(stage), "schedule": described(stage.schedule)} for stage in self.stages]
        plan = {**super()._describe_plan(), "rewind": self.rewind, "rewind_to": self.rewind_to, "stages": stages}
        return plan if self.first_score is None else {**plan, "first_score": self.first_score}


def _target_after(stage: Stage, epoch: int) -> float:
    """Share that the prunes of a stage have removed by its ``epoch``; 0 before the first, which ``start`` is not."""
    return stage.schedule.removed_after(epoch) if epoch >= stage.schedule.first_prune else 0.0


def _prune_epochs(stage: Stage, first: int) -> list[int]:
    return [first - 1 + epoch for epoch in stage.schedule.prune_epochs]
