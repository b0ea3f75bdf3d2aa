"""The training loss of a student: its task, what its teacher says, and what its teacher sees.

    goal = Classification()
    distiller = Distiller(teacher, student, teacher.tap_names, student.tap_names, goal=goal, example_inputs=inputs)
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05)
    losses = distiller.loss(inputs, target)  # inputs is a tuple
    losses.total.backward()

`Plain(student, goal)` is the same without a teacher.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .features import Features, selected
from .goals import Batches, Goal, Metric, evaluating
from .losses import SAD
from .modes import evaluation_mode
from .outputs import Pick
from .tapped import TappedNetwork, TeacherSource, TeacherTargets, check_inputs

__all__ = ["Custom", "Distiller", "Losses", "Plain"]


@dataclass(frozen=True)
class Losses:
    """Scalar terms of one training step; only `total` carries a graph, a term that was skipped is 0.

    total = task + alpha * kd + beta * sad. `task`, `kd` and `sad` are unweighted. A method with terms of its own adds
    fields in a subclass: whoever sums up `terms()` need not know them.
    """

    total: Tensor
    task: Tensor
    kd: Tensor
    sad: Tensor

    def terms(self) -> dict[str, Tensor]:
        """What a log shows of a step, by name and without a graph: "loss" is the total, then every other field."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"loss": named.pop("total").detach(), **named}


@dataclass(frozen=True)
class Custom(Goal):
    """Any loss: a function (output, target) -> scalar, and how a teacher is imitated if it is.

    `imitate` is a function (student's output, teacher's output) -> scalar; without one KD needs alpha=0. The output is
    whatever the model returns, or the part of it that `output=` of a Distiller names. The one score is the mean of the
    loss over the batches of a part, weighted by their rows.
    """

    function: Callable[[Any, Any], Tensor]
    imitate: Callable[[Any, Any], Tensor] | None = None

    name: ClassVar[str] = "custom"
    takes_tensor: ClassVar[bool] = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("loss", "test loss"),)

    def loss(self, output: Any, target: Any) -> Tensor:
        return self.function(output, target)

    def imitation(self, student_output: Any, teacher_output: Any, temperature: float) -> Tensor:
        """What `imitate` says, which no temperature softens."""
        if self.imitate is None:
            raise ValueError(
                "sparsekd.distill.Custom: a loss alone does not say how a teacher is imitated; "
                "use Custom(loss, imitate), or alpha=0"
            )
        return self.imitate(student_output, teacher_output)

    def scores(self, model: nn.Module, part: Batches, batch_size: int = 512) -> dict[str, float]:
        total, rows = 0.0, 0
        with evaluating(model):
            for inputs, target in part.batches(batch_size):
                total += float(self.loss(model(*inputs), target)) * len(target)
                rows += len(target)
        return {"loss": total / max(rows, 1)}


class Plain(nn.Module):
    """The loss of a student that learns its task alone. It has no parameters: everything stays the student's."""

    def __init__(self, student: nn.Module, goal: Goal | Callable[[Any, Any], Tensor], *, output: Pick = None) -> None:
        super().__init__()
        self.goal, self.output = _checked_goal("Plain", goal), output
        self._student = TappedNetwork("Plain", student, output=output, takes_tensor=self.goal.takes_tensor)

    @property
    def student(self) -> nn.Module:
        return self._student.network

    def loss(self, inputs: Sequence[Any], target: Tensor, taught: TeacherTargets | None = None) -> Losses:
        """The goal's loss of one batch: `inputs` for the network, `target` as the goal wants it.

        `taught` is for loops that train with a teacher and without: nothing is looked at in it.
        """
        check_inputs("Plain.loss", inputs)
        return _task_alone(self.goal, self._student.run(inputs)[0], target)

    def task_loss(self, inputs: Sequence[Any], target: Tensor) -> Losses:
        """The same: there is no teacher to leave out."""
        return self.loss(inputs, target)

    def extra_repr(self) -> str:
        return f"goal={self.goal}"


class Distiller(nn.Module):
    """The training loss of a student: task + alpha * KD + beta * SAD (papers: arXiv 2102.02973 and 2401.10484).

    teacher, student: modules called with the same inputs; their outputs are what `goal` takes.
    goal: the task and how a teacher is imitated: `Regression()`, `Classification()`, `Click()`, `Ranking()`, or any
    function (output, target) -> scalar (with alpha > 0 `Custom(loss, imitate)`).
    output: which part of what the networks return the goal takes: a key or attribute, a place in a tuple, or a function
    of the whole. Not needed where they return one tensor.
    teacher_taps, student_taps: names of the modules whose outputs SAD compares (see `FeatureTap`), used if beta > 0.
    temperature: softens what the goal compares for KD.
    matching: what compares features instead of a new SAD of width `dim`: a module (teacher features, student features)
    -> scalar, e.g. `AttentionTransfer()`.
    example_inputs: a tuple of inputs, needed if beta > 0: both networks run once, in eval mode, to learn the channels.
    channels_last: whether features have their channels last ([B, T, C], [B, H, W, C]) and not second. By default those
    of 3 dimensions are told apart by the modules that are tapped, and all others have them second.

    The teacher is put into eval mode and runs without gradients in every call, and not at all if alpha and beta are 0.
    Layers that it has in common with the student are back in their own mode afterwards.
    Both networks stay the caller's: `parameters()`, `state_dict()`, `.to()` and `.train()` of this module concern the
    SAD meta-network alone (`.sad`). Give its parameters to the optimizer beside the student's. The weights `alpha` and
    `beta` may be changed between calls; a term of weight 0 costs nothing.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        teacher_taps: Sequence[str],
        student_taps: Sequence[str],
        *,
        goal: Goal | Callable[[Any, Any], Tensor],
        output: Pick = None,
        example_inputs: Sequence[Any] | None = None,
        alpha: float = 0.9,
        beta: float = 200.0,
        temperature: float = 4.0,
        dim: int = 128,
        matching: nn.Module | None = None,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        self.goal, self.output = _checked_goal("Distiller", goal), output
        if isinstance(self.goal, Custom) and self.goal.imitate is None and alpha:
            raise ValueError(
                f"sparsekd.Distiller: alpha = {alpha} needs a goal that says how a teacher is imitated, got a "
                "loss alone; pass goal=sparsekd.distill.Custom(loss, imitate), or alpha=0"
            )
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 <= value < math.inf:
                raise ValueError(f"sparsekd.Distiller: {name} must be finite and >= 0, got {value}; 0 leaves it out")
        if not temperature > 0:
            raise ValueError(f"sparsekd.Distiller: temperature must be positive, got {temperature}; 4 is usual")
        if not (matching is None or isinstance(matching, nn.Module)):
            raise TypeError(
                "sparsekd.Distiller: matching must be a module (teacher features, student features) -> scalar, "
                f"got {type(matching).__name__} {matching!r}; None makes a SAD, or pass AttentionTransfer()"
            )
        if teacher is student:
            raise ValueError(
                "sparsekd.Distiller: teacher and student are one module, which would learn from itself; pass "
                "copy.deepcopy(model) as the teacher"
            )
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self._teacher, self._student = (
            TappedNetwork("Distiller", network, output=output, takes_tensor=self.goal.takes_tensor)
            for network in (teacher, student)
        )
        learning = set(student.modules())
        # Held in a list of its own, since they stay the caller's.
        self._common = [nn.ModuleList(module for module in teacher.modules() if module in learning)]
        self._known: tuple[TeacherSource, ...] = ()  # of whose targets it was found that they are of this teacher
        self.sad: nn.Module | None = None
        if beta > 0:
            if not isinstance(example_inputs, (tuple, list)):
                raise TypeError(
                    "sparsekd.Distiller: beta > 0 needs example_inputs, a tuple of inputs for both networks, "
                    f"got {type(example_inputs).__name__}; pass one small batch, e.g. (x[:2],)"
                )
            teacher_features = self._teacher.attach(teacher_taps, example_inputs, channels_last)
            student_features = self._student.attach(student_taps, example_inputs, channels_last)
            self.sad = SAD.from_features(teacher_features, student_features, dim) if matching is None else matching

    @property
    def teacher(self) -> nn.Module:
        return self._teacher.network

    @property
    def student(self) -> nn.Module:
        return self._student.network

    def loss(self, inputs: Sequence[Any], target: Tensor, taught: TeacherTargets | None = None) -> Losses:
        """The loss of one batch: `inputs` for the networks, `target` as the goal wants it.

        taught: what the teacher says and sees of these rows, out of a `TeacherCache`; without it the teacher is run.

        Raises what the goal, `FeatureTap` and `SAD` do for outputs and features that do not fit, and ValueError for
        `taught` of another teacher or other taps, or where `matching` needs whole features.
        """
        check_inputs("Distiller.loss", inputs)
        if self.beta and self.sad is None:
            raise ValueError("sparsekd.Distiller: made with beta=0, so without SAD, got beta > 0 later; make a new one")
        student_output, student_features = self._student.run(inputs, tapped=bool(self.beta))
        task = self.goal.loss(student_output, target)
        kd, sad = task.new_zeros(()), task.new_zeros(())
        if self.alpha or self.beta:
            teacher_output, teacher_features = self._ask(inputs) if taught is None else self._told(taught)
            if self.alpha:
                kd = self.goal.imitation(student_output, teacher_output, self.temperature)
            if self.beta and self.sad is not None:
                self._check_graph(student_features)
                sad = self.sad(teacher_features, student_features)
        total = task + self.alpha * kd + self.beta * sad
        return Losses(total, task.detach(), kd.detach(), sad.detach())

    def task_loss(self, inputs: Sequence[Any], target: Tensor) -> Losses:
        """The task alone: the teacher is not run, whatever alpha and beta are."""
        check_inputs("Distiller.task_loss", inputs)
        return _task_alone(self.goal, self._student.run(inputs, tapped=False)[0], target)

    def extra_repr(self) -> str:
        return f"goal={self.goal}, alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"

    def _ask(self, inputs: Sequence[Any]) -> tuple[Any, Features]:
        """Output and features of the teacher, which is run."""
        with torch.no_grad(), evaluation_mode(self._common[0]):
            self.teacher.eval()  # each time: whoever holds the teacher may have called .train() on it
            return self._teacher.run(inputs, tapped=bool(self.beta))

    def _told(self, taught: TeacherTargets) -> tuple[Any, Features]:
        """Output of the teacher and statistics of its features, which are known."""
        if taught.source is not None and taught.source not in self._known:
            self._check_is_of_teacher(taught.source, taught.taps)
            self._known = (*self._known, taught.source)
        if not self.beta:
            return taught.output, []
        if not getattr(self.sad, "takes_stats", False):
            raise ValueError(
                f"sparsekd.Distiller.loss: {type(self.sad).__name__} compares whole features, got the statistics of a "
                "TeacherCache; call loss without them, which runs the teacher, or match by SAD or AttentionTransfer"
            )
        missing = [name for name in self._teacher.taps if name not in taught.taps]
        if missing:
            raise ValueError(
                f"sparsekd.Distiller.loss: expected what the teacher's {', '.join(missing)} return, got a TeacherCache "
                f"of {', '.join(taught.taps) or 'no taps'}; make one of {list(self._teacher.taps)}"
            )
        return taught.output, selected(taught.stats, [taught.taps.index(name) for name in self._teacher.taps])

    def _check_is_of_teacher(self, source: TeacherSource, taps: Sequence[str]) -> None:
        """What was known of a teacher once is not looked at again."""
        own = self._teacher.source()
        wrong = own.otherwise(source)
        theirs = dict(zip(taps, source.channels_last, strict=True))
        for name, last in zip(self._teacher.taps, own.channels_last, strict=True):
            if theirs.get(name, last) != last:
                wrong = (
                    f"it has the channels of {name} {'second' if last else 'last'}, not {'last' if last else 'second'}"
                )
        if wrong:
            raise ValueError(
                f"sparsekd.Distiller.loss: expected a TeacherCache of this distiller's teacher, got one of another: "
                f"{wrong}; make one with the same teacher, output= and channels_last="
            )

    def _check_graph(self, features: list[Tensor]) -> None:
        """Raise ValueError where SAD could train nothing of the student."""
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.student.parameters())
        if trains and not any(feature.requires_grad for feature in features):
            raise ValueError(
                "sparsekd.Distiller.loss: no tapped feature of the student carries a graph, so that SAD trains nothing "
                "of it; tap layers behind trainable ones, without detach() between, or set beta=0"
            )


def _task_alone(goal: Goal, output: Any, target: Tensor) -> Losses:
    task = goal.loss(output, target)
    nothing = task.new_zeros(())
    return Losses(task, task.detach(), nothing, nothing)


def _checked_goal(where: str, goal: Goal | Callable[[Any, Any], Tensor]) -> Goal:
    if isinstance(goal, Goal):
        return goal
    if callable(goal) and not isinstance(goal, type):
        return Custom(goal)
    raise TypeError(
        f"sparsekd.{where}: goal must be a Goal, got {type(goal).__name__} {goal!r}; "
        "pass sparsekd.Regression(), Classification(), Click(), Ranking(), or a function (output, target) -> scalar"
    )
