"""Dense SAD as one would write it in plain torch: what `benchmarks.headline` holds this library against.

The loss is AFD's (arXiv 2102.02973), layer by layer as in its published code; the loop runs the teacher in every step.
Recipe, rates and batches are those of `sparsekd run`, so that only the means differ; an epoch here is a whole pass over
the rows, whose best is kept.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.models import norms_by_torch
from sparsekd.data import Task
from sparsekd.runs.averaging import AveragedWeights
from sparsekd.runs.plans.network import Network
from sparsekd.runs.plans.recipe import RECALIBRATION
from sparsekd.runs.rates import learning_rate


class PlainSAD(nn.Module):
    """[B, C, H, W] features of teacher and student -> scalar, as `sparsekd.SAD`."""

    def __init__(self, teacher_channels: list[int], student_channels: list[int], dim: int = 128) -> None:
        super().__init__()
        count = len(teacher_channels)
        self.dim, self.shape = dim, (len(student_channels), count, dim)
        self.queries = nn.ModuleList(nn.Sequential(nn.Linear(c, dim), nn.BatchNorm1d(dim)) for c in teacher_channels)
        self.keys = nn.ModuleList(
            nn.Sequential(nn.Linear(c, dim), nn.BatchNorm1d(dim), nn.ReLU()) for c in student_channels
        )
        self.bilinear = nn.Sequential(nn.Linear(dim, dim * count), nn.BatchNorm1d(dim * count))
        self.teacher_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(count, dim)))
        self.student_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(student_channels), dim)))

    def forward(self, teacher: list[Tensor], student: list[Tensor]) -> Tensor:
        query = torch.stack([q(f.mean((2, 3))) for q, f in zip(self.queries, teacher, strict=True)], 1)
        key = torch.stack([k(f.mean((2, 3))) for k, f in zip(self.keys, student, strict=True)], 1)
        bilinear = self.bilinear(key.flatten(0, 1)).view(-1, *self.shape)  # [B, S, T, q]
        logits = torch.einsum("bstq,btq->bts", bilinear, query) + self.teacher_position @ self.student_position.T
        attention = torch.softmax(logits / math.sqrt(self.dim), 2)
        loss = query.new_zeros(())
        for place, feature in enumerate(teacher):
            size = feature.shape[2], feature.shape[3]
            wanted = F.normalize(feature.square().mean(1).flatten(1))
            for other, seen in enumerate(student):
                pooled = F.adaptive_avg_pool2d(seen.square().mean(1, keepdim=True), size).flatten(1)
                distance = (F.normalize(pooled) - wanted).square().mean(1)
                loss = loss + (attention[:, place, other] * distance).mean()
        return loss


class Taps:
    """The latest outputs of inner modules, by forward hooks."""

    def __init__(self, model: Any) -> None:
        self._outputs: dict[str, Tensor] = {}
        for name in model.tap_names:
            model.get_submodule(name).register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self._outputs[name] = output

    @property
    def features(self) -> list[Tensor]:
        return list(self._outputs.values())


def train(
    task: Task, network: Network, teacher: nn.Module, student: nn.Module, seed: int
) -> tuple[dict[str, Tensor], float]:
    """State and validation error of the best epoch; `student` trains in place."""
    recipe, taps = network.recipe, (Taps(teacher), Taps(student))
    norms_by_torch(student)
    torch.manual_seed(1_000 + seed)
    with torch.no_grad():
        for model in (teacher.eval(), student.eval()):
            model(*task.train.examples(2))
    channels = [[feature.shape[1] for feature in tap.features] for tap in taps]
    sad = PlainSAD(channels[0], channels[1])
    optimizer = torch.optim.AdamW([*student.parameters(), *sad.parameters()], weight_decay=recipe.weight_decay)
    averaged = AveragedWeights(student, recipe.averaged)
    steps, epochs = task.train.steps(recipe.batch_size), recipe.epochs // recipe.splits
    best: tuple[dict[str, Tensor], float] = {}, math.inf
    for epoch in range(1, epochs + 1):
        student.train()
        order = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        for step, (inputs, target) in enumerate(task.train.batches(recipe.batch_size, order)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch, step / steps, (1, epochs))
            with torch.no_grad():
                answer = teacher(*inputs)
            output = student(*inputs)
            loss = F.mse_loss(output, target) + network.alpha * F.mse_loss(output, answer)
            loss = loss + network.beta * sad(*(tap.features for tap in taps))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averaged.update()
        with averaged.in_place():
            recalibrate(student, task, recipe.batch_size, order)
            error = task.goal.scores(student, task.val)["mse"]
            if error < best[1]:
                best = copy.deepcopy(student.state_dict()), error
    return best


@torch.no_grad()
def recalibrate(model: nn.Module, task: Task, batch_size: int, order: torch.Generator) -> None:
    """Batch norm statistics of some training batches, with dropout off: those of short epochs lag behind."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for inputs, _ in islice(task.train.batches(batch_size, order), RECALIBRATION):
        model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
