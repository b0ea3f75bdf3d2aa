"""What a network is for: its loss, how it imitates a teacher, and what it is worth on data it has not seen.

    goal = Regression(target_range=(0.5, 5.0))
    goal.loss(model(*inputs), target).backward()
    goal.scores(model, task.test)                # {"mse": 0.71, "mae": 0.66}

Nothing else in the package asks what kind a task is: runs ask its goal, and a report is drawn from what the goal says
about its metrics (`describe`).

Names in this file: B batch, N rows of a part, U users, I items, K negatives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import pairs, ranks
from .losses import at_least_float32, check_same_shape, kd_loss, kd_regression_loss
from .modes import evaluation_mode

__all__ = [
    "Batches",
    "Classification",
    "Click",
    "Goal",
    "Metric",
    "Ranked",
    "Ranking",
    "Regression",
    "evaluating",
    "predict",
]


@dataclass(frozen=True)
class Metric:
    """One number that says what a network is worth, and how a report shows it.

    name              key in `Goal.scores` and in results.json.
    heading           of its column in a table.
    scale, digits     a table shows `scale * value` with that many decimals; 100 makes per cent of a share.
    higher_is_better  the direction; where neither end is good, `ideal` is the value that the best network has.
    """

    name: str
    heading: str
    scale: float = 1.0
    digits: int = 4
    higher_is_better: bool = False
    ideal: float | None = None

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is strictly better than `b`. NaN is better than nothing, and nothing is better than a tie."""
        if self.ideal is not None:
            return abs(a - self.ideal) < abs(b - self.ideal)
        return a > b if self.higher_is_better else a < b

    def describe(self) -> dict[str, Any]:
        """The fields, for a JSON file; `ideal` only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "ideal" or value is not None}


def headline(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """What a line has room for: of metrics at several cutoffs, as "recall@20", those at the cutoff of the first one."""
    cutoff = metrics[0].name.partition("@")[2]
    return tuple(metric for metric in metrics if metric.name.partition("@")[2] == cutoff)


class Batches(Protocol):
    """What the goals of single rows read of a part: its batches, all rows in order (see `data.Part`)."""

    def batches(self, batch_size: int, /) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]: ...


class Ranked(Protocol):
    """What `Ranking` reads of a part: held-out pairs, and what each user has seen before (see `data.Pairs`)."""

    @property
    def users(self) -> Tensor: ...  # int64 [N]

    @property
    def items(self) -> Tensor: ...  # int64 [N]

    @property
    def num_items(self) -> int: ...

    @property
    def seen_offsets(
        self,
    ) -> Tensor: ...  # int64 [U + 1]: those of user u are from [u] to [u + 1]

    @property
    def seen_items(self) -> Tensor: ...  # int64


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients; every module is back in its own mode afterwards."""
    # Not inference_mode: autograd would refuse a tensor that the model makes now and keeps, a table of positions say.
    with evaluation_mode(model), torch.no_grad():
        yield


def predict(model: nn.Module, part: Batches, batch_size: int = 512) -> Tensor:
    """Outputs [N, ...] of a whole part, in evaluation mode; on the CPU, in float32."""
    return _predictions_and_targets(model, part, batch_size)[0]


def _predictions_and_targets(model: nn.Module, part: Batches, batch_size: int) -> tuple[Tensor, Tensor]:
    with evaluating(model):
        answers = [(model(*inputs), target) for inputs, target in part.batches(batch_size)]
        predictions, targets = zip(*answers, strict=True)
        return torch.cat(predictions).float().cpu(), torch.cat(targets).cpu()


class Goal(ABC):
    """What a network learns and how it is judged. A goal holds settings, no state: one serves any number of networks.

    name       in results.json.
    baselines  names of simple predictors that a network has to beat, which `runs.baselines` looks up; a task leaves out
               those that need what it does not have (users, for one).
    """

    name: ClassVar[str]
    baselines: ClassVar[tuple[str, ...]] = ()
    takes_tensor: ClassVar[bool] = True  # a model's output is one tensor

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """All metrics that `scores` returns. The first one judges: it picks epochs and densities."""

    @property
    def judge(self) -> Metric:
        """The metric that picks epochs and densities."""
        return self.metrics[0]

    @abstractmethod
    def loss(self, output: Any, target: Tensor) -> Tensor:
        """What training lowers, a scalar, of the output of a network for one batch."""

    @abstractmethod
    def imitation(self, student_output: Any, teacher_output: Any, temperature: float) -> Tensor:
        """How far a student's output is from its teacher's, a scalar; the teacher gets no gradient."""

    @abstractmethod
    def scores(self, model: nn.Module, part: Any, batch_size: int = 512) -> dict[str, float]:
        """Every metric of a network on a part, by name: in evaluation mode, from float32 outputs on the CPU."""

    def describe(self) -> dict[str, Any]:
        """What results.json carries of a goal: enough to draw a report."""
        return {"name": self.name, "metrics": [metric.describe() for metric in self.metrics]}


class _RowGoal(Goal):
    """A goal whose outputs and targets belong to single rows."""

    def scores(self, model: nn.Module, part: Batches, batch_size: int = 512) -> dict[str, float]:
        return self.measure(*_predictions_and_targets(model, part, batch_size))

    @abstractmethod
    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Every metric of float32 predictions [N, ...] for targets [N], both on the CPU."""


@dataclass(frozen=True)
class Regression(_RowGoal):
    """A number: squared error to the target, and to the teacher. Scores clip predictions to `target_range`.

    Outputs and targets have the same shape, usually [B].
    """

    target_range: tuple[float, float] = (-math.inf, math.inf)

    name: ClassVar[str] = "regression"
    baselines: ClassVar[tuple[str, ...]] = ("constant", "biases", "running_biases", "ridge", "boosting")

    def __post_init__(self) -> None:
        low, high = self.target_range
        if not low < high:
            raise ValueError(f"sparsekd.Regression: target_range must be (lowest, highest), got {self.target_range}")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return Metric("mse", "test MSE"), Metric("mae", "test MAE")

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        _check_like_target("Regression", output, target)
        output = at_least_float32(output)
        return F.mse_loss(output, target.to(output.dtype))

    def imitation(self, student_output: Tensor, teacher_output: Tensor, temperature: float) -> Tensor:
        """The squared error to the teacher's number, which no temperature softens."""
        return kd_regression_loss(student_output, teacher_output)

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        _check_like_target("Regression", prediction, target)
        error = prediction.double().clamp(*self.target_range).numpy() - target.double().numpy()
        return {"mse": float((error**2).mean()), "mae": float(abs(error).mean())}


@dataclass(frozen=True)
class Classification(_RowGoal):
    """One of several classes: cross-entropy of logits [B, classes] to targets int64 [B]; KD softens both by T."""

    name: ClassVar[str] = "classification"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("accuracy", "test accuracy %", 100.0, 2, higher_is_better=True),
            Metric("cross_entropy", "test cross-entropy"),
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(output), target)

    def imitation(self, student_output: Tensor, teacher_output: Tensor, temperature: float) -> Tensor:
        """Hinton's KD: T^2 KL(teacher || student) of the softened classes."""
        return kd_loss(student_output, teacher_output, temperature)

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        accuracy = (prediction.argmax(1) == target).double().mean()
        return {"accuracy": float(accuracy), "cross_entropy": float(F.cross_entropy(prediction, target))}


@dataclass(frozen=True)
class Click(_RowGoal):
    """The probability of a click (or of any yes): binary cross-entropy of logits [B] to targets 0 or 1 [B].

    - ``log_loss``: mean binary cross-entropy, in nats.
    - ``normalised_entropy``: log_loss over the entropy of the share of clicks (He et al., Practical Lessons from
      Predicting Clicks on Ads at Facebook, ADKDD 2014): below 1 is better than always predicting that share.
    - ``auc``: how often a click is ranked above a row without one; a tie counts one half.
    - ``calibration``: predicted over observed clicks; 1 is best.
    """

    name: ClassVar[str] = "click"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("normalised_entropy", "test normalised entropy"),
            Metric("log_loss", "test log loss"),
            Metric("auc", "test AUC", higher_is_better=True),
            Metric("calibration", "test calibration", ideal=1.0),
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        _check_like_target("Click", output, target)
        output = at_least_float32(output)
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))

    def imitation(self, student_output: Tensor, teacher_output: Tensor, temperature: float) -> Tensor:
        """T^2 KL(teacher || student) of click and no click, both logits divided by T: KD of the two classes."""
        check_same_shape("Click.imitation", student_output, teacher_output)
        # sigmoid(z) is the softmax of the logits (0, z).
        student, teacher = (
            torch.stack([torch.zeros_like(logit), logit], dim=1)
            for logit in (student_output.flatten(), teacher_output.flatten())
        )
        return kd_loss(student, teacher, temperature)

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Raises ValueError where the targets are not 0 and 1, or all the same: then two metrics mean nothing."""
        _check_like_target("Click", prediction, target)
        logit, target = prediction.double().flatten(), target.double().flatten()
        if not ((target == 0) | (target == 1)).all():
            raise ValueError("sparsekd.Click: targets must be 0 or 1, got others; make them so, or use Regression()")
        count, clicks = len(target), float(target.sum())
        if not 0 < clicks < count:
            raise ValueError(
                f"sparsekd.Click: entropy and AUC need rows with and without a click, got {clicks:.0f} clicks in "
                f"{count} rows; take a larger part or a longer period"
            )
        log_loss = float(F.binary_cross_entropy_with_logits(logit, target))
        share = clicks / count
        entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
        return {
            "normalised_entropy": log_loss / entropy,
            "log_loss": log_loss,
            "auc": ranks.auc(logit, target),
            "calibration": float(logit.sigmoid().sum()) / clicks,
        }


@dataclass(frozen=True)
class Ranking(Goal):
    """The items that a user will choose come first.

    A ranking network is called with (users [B], items [B], negatives [B, K]) and returns the pair (scores of the items
    [B], scores of the negatives [B, K]). For its scores it also has `score_items(users [U]) -> [U, I]`: all items.

    The loss is BPR (Rendle et al., UAI 2009): -log sigmoid(item - negative), averaged over all pairs. Scores sort all
    items that a user has not seen before, the best first and ties by item number. Means over the users of the part:

    recall@k  share of a user's held-out items among the first k.
    ndcg@k    sum of 1 / log2(1 + rank) over the held-out items among the first k, divided by what it could be at most.
    hr@k      share of the users with a held-out item among the first k.
    mrr@k     1 / rank of the first held-out item, 0 where it is not among the first k.
    """

    cutoffs: tuple[int, ...] = (5, 10, 20)

    name: ClassVar[str] = "ranking"
    baselines: ClassVar[tuple[str, ...]] = ("popular", "item_knn", "ease")
    takes_tensor: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.cutoffs or list(self.cutoffs) != sorted(set(self.cutoffs)) or self.cutoffs[0] < 1:
            raise ValueError(f"sparsekd.Ranking: cutoffs must rise from 1 or more, got {self.cutoffs}")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """NDCG at the last cutoff judges; the other cutoffs follow from large to small, then the other metrics."""
        return tuple(
            Metric(f"{name}@{cutoff}", f"test {heading}@{cutoff}", higher_is_better=True)
            for name, heading in (("ndcg", "NDCG"), ("recall", "recall"), ("hr", "HR"), ("mrr", "MRR"))
            for cutoff in reversed(self.cutoffs)
        )

    def loss(self, output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """BPR of one batch; the target is not read: which item is the positive one is known from its place."""
        items, negatives = _scored_pairs("Ranking.loss", output)
        return -F.logsigmoid(items[:, None] - negatives).mean()

    def imitation(
        self, student_output: tuple[Tensor, Tensor], teacher_output: tuple[Tensor, Tensor], temperature: float
    ) -> Tensor:
        """KD over each user's candidates, the item and its negatives, as if they were classes: T^2 KL(teacher ||
        student). With one negative these are the two sides of the sigmoid in BPR."""
        student, teacher = (
            torch.cat([items[:, None], negatives], dim=1)
            for items, negatives in (
                _scored_pairs("Ranking.imitation", output) for output in (student_output, teacher_output)
            )
        )
        return kd_loss(student, teacher, temperature)

    def scores(self, model: nn.Module, part: Ranked, batch_size: int = 512) -> dict[str, float]:
        """Full-sort scores, in blocks of `batch_size` users.

        Raises TypeError for a network without `score_items`, ValueError where it returns other than finite [U, I] or
        where an item is both held out and seen before by the same user.
        """
        score_items = getattr(model, "score_items", None)
        if not callable(score_items):
            raise TypeError(
                f"sparsekd.Ranking.scores: {type(model).__name__} must have a method score_items(users [U]) -> scores "
                "of all items [U, I]; add it"
            )
        if not len(part.users):
            raise ValueError("sparsekd.Ranking.scores: the part must hold out at least one pair, got none")
        held_users, held_items = pairs.once(part.users.cpu(), part.items.cpu(), part.num_items)
        users, counts = torch.unique_consecutive(held_users, return_counts=True)
        offsets, seen_items = part.seen_offsets.cpu(), part.seen_items.cpu()
        sums = dict.fromkeys((metric.name for metric in self.metrics), 0.0)
        begin = 0
        with evaluating(model):
            for block in users.split(batch_size):
                end = begin + len(block)
                first_pair, end_pair = int(counts[:begin].sum()), int(counts[:end].sum())
                relevant = torch.zeros(len(block), part.num_items, dtype=torch.bool)
                relevant[
                    torch.arange(len(block)).repeat_interleave(counts[begin:end]), held_items[first_pair:end_pair]
                ] = True
                seen = ranks.segments(offsets, seen_items, block)
                _check_not_seen(relevant, block, seen)
                scores = score_items(block.to(part.users.device))
                _check_scores(scores, relevant)
                hits = relevant.gather(1, ranks.best_first(scores, seen, self.cutoffs[-1]))
                for name, total in ranks.of_hits(hits, counts[begin:end], self.cutoffs).items():
                    sums[name] += total
                begin = end
        return {name: total / len(users) for name, total in sums.items()}


def _check_scores(scores: Tensor, relevant: Tensor) -> None:
    shape = tuple(relevant.shape)
    # The extremes tell of NaN too, and take one pass without a copy.
    if scores.shape != shape or not torch.stack(torch.aminmax(scores)).isfinite().all():
        what = "others than finite numbers" if scores.shape == shape else f"{tuple(scores.shape)}"
        raise ValueError(f"sparsekd.Ranking.scores: score_items must return finite {shape}, got {what}")


def _check_not_seen(relevant: Tensor, users: Tensor, seen: tuple[Tensor, Tensor]) -> None:
    rows, items = seen
    both = relevant[rows, items].nonzero().flatten()
    if len(both):
        raise ValueError(
            f"sparsekd.Ranking.scores: item {int(items[both[0]])} of user {int(users[rows[both[0]]])} is held out, but "
            "seen before as well, so it cannot be recommended; leave such pairs out of the part"
        )


def _scored_pairs(function: str, output: Any) -> tuple[Tensor, Tensor]:
    """The scores of items [B] and of their negatives [B, K] that a ranking network returned."""
    pair = output if isinstance(output, (tuple, list)) and len(output) == 2 else (None, None)
    items, negatives = pair
    if not (isinstance(items, Tensor) and isinstance(negatives, Tensor)):
        raise TypeError(
            f"sparsekd.{function}: the network must return (scores of items [B], scores of negatives [B, K]), "
            f"got {type(output).__name__}"
        )
    if items.dim() != 1 or negatives.dim() != 2 or len(items) != len(negatives) or not negatives.shape[1]:
        raise ValueError(
            f"sparsekd.{function}: scores must be [B] of items and [B, K] of negatives with K of 1 or more, "
            f"got {tuple(items.shape)} and {tuple(negatives.shape)}; squeeze or unsqueeze one of them"
        )
    return at_least_float32(items), at_least_float32(negatives)


def _check_like_target(goal: str, output: Tensor, target: Tensor) -> None:
    # torch would broadcast [B] against [B, 1] to [B, B] and train on nonsense.
    if output.shape != target.shape:
        raise ValueError(
            f"sparsekd.{goal}: needs an output of the target's shape, "
            f"got output {tuple(output.shape)} and target {tuple(target.shape)}; squeeze or reshape one of them"
        )
