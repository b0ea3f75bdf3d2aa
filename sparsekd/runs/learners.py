"""What a network learns by: its task alone or under a teacher, and a method that prunes it or does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockPattern
from ..data import Task
from ..distill import Distiller, Plain
from ..losses import AttentionTransfer
from ..methods import METHODS, TABLE_METHODS, Method, SparseRec
from ..modes import evaluation_mode
from ..pruning import CostTable
from ..taps import FeatureTap
from .evaluate import not_pruned
from .plans.network import Network


def learner_of(model: nn.Module, task: Task, network: Network, teacher: nn.Module | None, seed: int) -> Method:
    """What `network` describes. It may replace layers of `model` in place: make the optimizer after it."""
    torch.manual_seed(1_000 + seed)  # the SAD meta-network
    examples = task.train.examples(2)
    distiller = _distiller(model, task, network, teacher, examples)
    if network.method in TABLE_METHODS:
        return _over_tables(distiller, task, network, seed)
    if network.method is None or network.schedule is None:
        return Method(distiller)
    return METHODS[network.method](
        distiller,
        network.schedule,
        epochs=network.recipe.epochs,
        pattern=BlockPattern.parse(network.pattern),
        exclude=not_pruned(model) or None,
        seed=seed,
        example_inputs=examples,
        costs=None if network.costs is None else CostTable.load(network.costs),
        **network.options,
    )


def _over_tables(distiller: Distiller | Plain, task: Task, network: Network, seed: int) -> Method:
    """A method that prunes the tables of a recommender."""
    if network.method == SparseRec.name:
        recipe = network.recipe
        steps = recipe.epochs * task.train.steps(recipe.batch_size) // recipe.splits
        chosen = task.train.users, task.train.items
        return SparseRec(distiller, chosen, steps=steps, seed=seed, **network.options)
    return TABLE_METHODS[str(network.method)](distiller, **network.options)


def _distiller(
    model: nn.Module, task: Task, network: Network, teacher: nn.Module | None, examples: tuple[Tensor, ...]
) -> Distiller | Plain:
    if teacher is None or network.alpha == network.beta == 0:
        return Plain(model, task.goal)
    # Recommenders have no feature maps; their scores are distilled.
    taps: Any = (teacher.tap_names, model.tap_names) if network.beta else ((), ())
    matching = None
    if network.features == "at":
        taps, matching = _pairs(teacher, model, examples), AttentionTransfer()
    return Distiller(
        teacher,
        model,
        *taps,
        example_inputs=examples,
        goal=task.goal,
        alpha=network.alpha,
        beta=network.beta,
        matching=matching,
    )


@torch.no_grad()
def _pairs(teacher: nn.Module, student: nn.Module, examples: tuple[Tensor, ...]) -> tuple[list[str], list[str]]:
    """Taps that attention transfer lays side by side: the last one of each size of map that both networks have."""
    tap_of_size: list[dict[torch.Size, str]] = []
    for network in (teacher, student):
        names: Any = network.tap_names
        with evaluation_mode(network):
            features = FeatureTap(network, names)(*examples)[1]
        tap_of_size.append({feature.shape[2:]: name for name, feature in zip(names, features, strict=True)})
    of_teacher, of_student = tap_of_size
    common = [size for size in of_teacher if size in of_student]
    return [of_teacher[size] for size in common], [of_student[size] for size in common]
