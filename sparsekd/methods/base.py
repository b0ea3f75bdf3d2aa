"""The hooks that a training loop calls, whatever is trained and however the data comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..distill import Distiller, Losses, Plain
from ..tapped import TeacherTargets


@dataclass(frozen=True)
class PruneEvent:
    """What happened at a boundary; 0 is before training.

    target: share that the schedule wanted gone, of what ``unit`` names. kept: weights as ``Pruner.num_kept`` counts
    them, ``removed_share`` is theirs. dead: biases and batch norm weights that died with their filters. macs:
    multiply-adds of one example that are left, and removed_macs the share that is gone; None if they are unknown.
    predicted_us: of the frozen student, None without costs.
    """

    boundary: int
    stage: str
    target: float
    removed_share: float
    kept: int
    dead: int
    rewound: bool
    unit: str = "weights"
    macs: float | None = None
    removed_macs: float | None = None
    predicted_us: float | None = None


class Method:
    """A student in training. As it stands, one that learns and is not pruned; subclasses prune it on the way::

        method = Method(distiller)
        optimizer = SGD([*method.student.parameters(), *method.parameters()], lr=0.05, momentum=0.9)
        method.attach(optimizer)
        method.before_training()                        # a PruneEvent or None
        for number, batches in enumerate(epochs, 1):    # or windows of a stream
            for inputs, target in batches:              # inputs: a tuple
                optimizer.zero_grad()
                method.loss(inputs, target).total.backward()
                optimizer.step()
                method.after_step()
            event = method.after_boundary(number)       # a PruneEvent or None

    A boundary is where a stretch of training ends: an epoch, or a window of a stream. Boundaries are counted from 1,
    and schedules count boundaries, so one method serves both loops.

    Args:
        distiller: a ``Distiller``, or a ``Plain`` student without a teacher. Subclasses may replace the layers of the
            student in place: make the optimizer after the method.
    """

    name: ClassVar[str] = "none"

    def __init__(self, distiller: Distiller | Plain) -> None:
        self.distiller = distiller

    @property
    def student(self) -> nn.Module:
        return self.distiller.student

    @property
    def serving_student(self) -> nn.Module:
        """What is scored and serves while the student learns: the student, unless a method serves another network."""
        return self.student

    def __str__(self) -> str:
        return f"{self.name}: {type(self.distiller).__name__}"

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains beside the student: the SAD meta-network, where there is one."""
        return self.distiller.parameters()

    def attach(self, optimizer: Optimizer) -> None:
        """Call once, before training: a method that prunes shrinks this optimizer's state along with the weights."""

    def loss(self, inputs: Sequence[Any], target: Tensor, taught: TeacherTargets | None = None) -> Losses:
        """The loss of one batch, as it is to be at this point of the training.

        taught: what the teacher says and sees of these rows, out of a ``TeacherCache``; without it the teacher is run.
        """
        return self.distiller.loss(inputs, target, taught)

    def before_training(self, batches: Iterable[Sequence[Any]] = ()) -> PruneEvent | None:
        """Call after ``attach``, before the first step: prunes where that is to be done before training. The batches,
        as ``loss`` takes them, are for methods that judge by them what goes."""
        return None

    def after_step(self) -> None:
        """Call after every ``optimizer.step()``: what is gone stays gone."""

    def after_boundary(self, number: int) -> PruneEvent | None:
        """Call at the end of every epoch or window, with its number from 1: prunes where it is time to."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values, no pickle. Save the student's and the optimizer's ``state_dict()`` beside it."""
        state = {f"distiller.{key}": value for key, value in self.distiller.state_dict().items()}
        return {"plan": self._describe_plan(), **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, on a new method of the same dense student. Then load the student's
        and the optimizer's own state. Raises ValueError for the state of another method, schedule or model."""
        self._check_plan_of(state)
        self.distiller.load_state_dict(part_of(state, "distiller."))

    def _describe_plan(self) -> dict[str, Any]:
        """What a saved state must have in common with this method: JSON values."""
        return {"method": self.name}

    def _check_plan_of(self, state: dict[str, Any]) -> None:
        if state.get("plan") != self._describe_plan():
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: expected the state of {self._describe_plan()}, "
                f"got {state.get('plan')}; make the method as it was when the state was saved"
            )


def part_of(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
