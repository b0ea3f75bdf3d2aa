"""Which units of a network stay and which come back: scores, compared over all layers or within each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .scores import choose_growth, choose_units, growth_ranks, lamp_scores, layer_ranks, random_scores
from .units import Units

Scores = Mapping[str, Tensor]  # layer's name -> a score of every block, in the shape of its mask


@dataclass(frozen=True)
class Rule:
    """How a Pruner chooses: ``scope`` and ``score`` as there."""

    scope: str
    score: str
    generator: torch.Generator

    def kept(self, layers: Sequence[Units], remove: float, given: Scores | None) -> list[Tensor]:
        """For each layer, which of its kept entries stay (bool) if ``remove`` weights go."""
        entries = [units.kept(score) for units, score in zip(layers, in_order(layers, given), strict=True)]
        sizes = [of_layer.unit_sizes() for of_layer in entries]
        if given is not None:
            scores = [of_layer.unit_worth() for of_layer in entries]
        elif self.score == "random":
            scores = [random_scores(len(of_layer), self.generator) for of_layer in sizes]
        else:
            scores = [of_layer.unit_worth().sqrt() for of_layer in entries]  # root mean squares
        if given is None and self.score == "lamp":
            scores = [lamp_scores(score, size) for score, size in zip(scores, sizes, strict=True)]
        if self.scope == "layer":
            triples = zip(scores, sizes, layers, strict=True)
            scores = [layer_ranks(score, size, units.num_weights) for score, size, units in triples]
        chosen = choose_units(scores, sizes, remove)
        return [stays[of_layer.unit] for stays, of_layer in zip(chosen, entries, strict=True)]

    def growth(self, layers: Sequence[Units], add: float, given: Scores | None) -> list[Tensor]:
        """For each layer, which of its entries that are gone come back (bool) if ``add`` weights do."""
        entries = [units.gone(score) for units, score in zip(layers, in_order(layers, given), strict=True)]
        sizes = [of_layer.unit_sizes() for of_layer in entries]
        if given is None:
            scores = [random_scores(len(of_layer), self.generator) for of_layer in sizes]
        else:
            scores = [of_layer.unit_worth() for of_layer in entries]
        if self.scope == "layer":
            triples = zip(scores, sizes, layers, strict=True)
            scores = [growth_ranks(score, size, units.num_kept, units.num_weights) for score, size, units in triples]
        chosen = choose_growth(scores, sizes, add)
        return [comes[of_layer.unit] for comes, of_layer in zip(chosen, entries, strict=True)]


def in_order(layers: Sequence[Units], scores: Scores | None) -> list[Tensor | None]:
    """The caller's scores in the order of the layers, checked."""
    if scores is None:
        return [None] * len(layers)
    for units in layers:
        shape = tuple(units.mask().shape)
        got = tuple(scores[units.name].shape) if units.name in scores else "nothing"
        if got != shape:
            raise ValueError(
                f"Pruner: expected scores of layer {units.name!r} of shape {shape}, one for each entry of masks(), "
                f"got {got}"
            )
    unknown = set(scores) - {units.name for units in layers}
    if unknown:
        raise ValueError(
            f"Pruner: got scores of {', '.join(sorted(unknown))}, which it does not prune; "
            f"its layers are {', '.join(units.name for units in layers)}"
        )
    return [scores[units.name].detach() for units in layers]
