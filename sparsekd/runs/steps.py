"""The stepper: batches in, optimizer steps out. It knows no epoch and no window; the loops above it do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import distributed, optim
from ..data.parts import Batch
from ..methods import Method
from ..tapped import TeacherTargets
from .runtime import Runtime

TaughtBatch = tuple[tuple[Tensor, ...], Tensor, TeacherTargets]


@dataclass(frozen=True)
class Rate:
    """How the optimizer takes one step."""

    lr: float
    weight_decay: float


class Stepper:
    """Takes optimizer steps for a student and what trains beside it, on every rank alike.

    >>> stepper = Stepper(method, "adamw", Runtime())                                            # doctest: +SKIP
    >>> stepper.learn(part.batches(64), lambda step: Rate(lr=0.01, weight_decay=0.0))            # doctest: +SKIP
    {"loss": 1.25, "task": 1.25, "kd": 0.0, "sad": 0.0}
    """

    def __init__(
        self, method: Method, optimizer: str, runtime: Runtime, after_step: Callable[[], None] = lambda: None
    ) -> None:
        self.method, self.runtime, self.after_step = method, runtime, after_step
        self.optimizer = _optimizer(optimizer, self.model, self.parameters)
        method.attach(self.optimizer)

    @property
    def model(self) -> nn.Module:
        return self.method.student

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that trains now: a prune gives the model other parameters than it had."""
        return [*self.model.parameters(), *self.method.parameters()]

    def learn(self, batches: Iterable[Batch | TaughtBatch], rate_at: Callable[[int], Rate]) -> dict[str, float]:
        """One step for each batch, at the rate of its number (from 0); the mean of every term over steps and ranks.

        A batch is what the loss of the method takes: inputs, target, and what a teacher that is not run says of them.
        """
        loss = torch.compile(self.method.loss) if self.runtime.compiled else self.method.loss
        trained = self.parameters
        names: tuple[str, ...] = ()
        sums, taken = torch.zeros(0), 0
        self.model.train()
        for batch in batches:
            self._set(rate_at(taken))
            self.optimizer.zero_grad()
            with self.runtime.autocast():
                losses = loss(*batch)
            losses.total.backward()
            distributed.average_gradients(trained)
            self.optimizer.step()
            self.method.after_step()
            self.after_step()
            terms = losses.terms()
            if not taken:
                names, sums = tuple(terms), torch.zeros(len(terms), device=self.runtime.device)
            sums += torch.stack(list(terms.values()))
            taken += 1
        if not taken:
            raise ValueError("sparsekd.runs: there was no batch to learn; a batch needs 2 rows or more on every rank")
        if distributed.num_ranks() > 1:
            dist.all_reduce(sums)
        means = sums / taken / distributed.num_ranks()
        return dict(zip(names, means.tolist(), strict=True))

    def check_ranks(self) -> None:
        """Raise RuntimeError where ranks have trained apart, then give all of them the batch norm statistics of rank 0.

        Each rank has seen other rows. Nothing else is copied, which would hide that ranks train apart.
        """
        if distributed.num_ranks() == 1:
            return
        distributed.check_same_parameters(self.parameters)
        for module in (self.model, self.method.distiller):
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, src=0)

    def _set(self, rate: Rate) -> None:
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate.lr, rate.weight_decay


def _optimizer(name: str, model: nn.Module, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer whose rate and decay are set anew before every step."""
    if name == "adamw":
        # One kernel a parameter: of a small pruned student, a dozen each are 6 % of a step.
        return torch.optim.AdamW(parameters, fused=True)
    if name in ("sgd", "nesterov"):
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, nesterov=name == "nesterov")
    if name == "sparse-adam":
        optimizer = optim.SparseAdam(model)
        others = len(parameters) - len(optimizer.param_groups[0]["params"])
        if others:
            raise ValueError(
                f"sparsekd.runs: sparse-adam trains packed tables with sparse=True alone, got {others} other "
                f"parameters beside those of {type(model).__name__}; take adamw, and make the model without sparse=True"
            )
        return optimizer
    raise ValueError(f"sparsekd.runs: optimizer must be adamw, sgd, nesterov or sparse-adam, got {name!r}")
