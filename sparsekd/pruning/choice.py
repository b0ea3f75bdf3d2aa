"""Which units of a network stay and which come back: scores, in the order of a scope, until a cost is reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Budget, Linear
from .cost import Timed
from .scores import (
    choose_growth,
    choose_units,
    growth_ranks,
    lamp_scores,
    layer_ranks,
    random_scores,
    strongest,
    weakest_first,
)
from .units import Entries, Units

Scores = Mapping[str, Tensor]  # layer's name -> a score of every block, in the shape of its mask
Meter = Linear | Timed
SCOPES = ("global", "layer", "cost")
FREE = 1e300  # the worth, for its cost, of a unit that costs nothing


class Unreachable(Exception):
    """A budget that what has to stay does not allow.

    least: the smallest cost possible. layer: whose part of it is the largest.
    """

    def __init__(self, least: float, layer: str, floor: float) -> None:
        super().__init__(least, layer, floor)
        self.least, self.layer, self.floor = least, layer, floor

    def describe(self, budget: Budget | None, dense: float) -> str:
        stays = "one unit of each layer stays"
        stays += f", and {self.floor:.3g} of its weights" if self.floor else ""
        at_best = f"{self.least:.6g} weights" if budget is None else budget.amount(self.least, dense)
        goes = budget is not None and budget.is_share and budget.removed
        most = f"no more than {at_best} can go" if goes else f"{at_best} is the smallest budget possible"
        return (
            f"{budget or 'this'} cannot be reached: {stays}, so that {most}; the largest part of what stays is "
            f"{self.layer!r}; {'remove less' if goes else 'ask for more'}, lower floor, use smaller blocks, or exclude "
            "no layers"
        )


@dataclass(frozen=True)
class Rule:
    """How a Pruner chooses: ``scope``, ``score`` and ``floor`` as there."""

    scope: str
    score: str
    floor: float
    generator: torch.Generator

    def kept(self, layers: Sequence[Units], meter: Meter, remove: float, given: Scores | None) -> list[Tensor]:
        """For each layer, which of its kept entries stay (bool) if ``remove`` of the cost goes."""
        entries = [units.kept(score) for units, score in zip(layers, in_order(layers, given), strict=True)]
        sizes = [of_layer.unit_sizes() for of_layer in entries]
        scores = self._scores(entries, sizes, given)
        if self.scope == "layer":
            triples = zip(scores, sizes, layers, strict=True)
            order = [layer_ranks(score, size, units.num_weights) for score, size, units in triples]
        else:
            energies = self.scope == "cost" and given is None and self.score == "magnitude"
            worth = [score.square() for score in scores] if energies else scores
            at_random = given is None and self.score == "random"
            order = worth if at_random else self._for_their_cost(layers, entries, worth, meter, [0] * len(layers))
        stays = self._stays(layers, order, sizes)
        costs = self._check(layers, meter, remove, entries, sizes, stays)
        if isinstance(meter, Linear):
            chosen = choose_units(order, costs, remove, stays)
        else:
            chosen = self._choose_timed(layers, order, sizes, stays, meter, remove)
        return [units[of_layer.unit] for units, of_layer in zip(chosen, entries, strict=True)]

    def check(self, layers: Sequence[Units], meter: Meter, remove: float) -> None:
        """Raises Unreachable where ``kept`` would, whatever the weights are by then."""
        entries = [units.kept(None) for units in layers]
        sizes = [of_layer.unit_sizes() for of_layer in entries]
        alike = [torch.zeros(len(size)) for size in sizes]
        self._check(layers, meter, remove, entries, sizes, self._stays(layers, alike, sizes))

    def _stays(self, layers: Sequence[Units], order: list[Tensor], sizes: list[Tensor]) -> list[Tensor]:
        return [strongest(*of_layer) for of_layer in zip(order, sizes, self.floors(layers), strict=True)]

    def _check(
        self,
        layers: Sequence[Units],
        meter: Meter,
        remove: float,
        entries: list[Entries],
        sizes: list[Tensor],
        stays: list[Tensor],
    ) -> list[Tensor]:
        """What each unit costs, nothing where costs do not add up. Raises Unreachable."""
        if isinstance(meter, Linear):
            costs = [meter.marginal(units, of_layer) for units, of_layer in zip(layers, entries, strict=True)]
            least = [float(cost[stay].sum()) for cost, stay in zip(costs, stays, strict=True)]
            short = sum(least) - (sum(float(cost.sum()) for cost in costs) - remove)
            if short >= max(float(cost.max()) for cost in costs):
                raise self._unreachable(layers, least, sum(least))
            return costs
        floor = [float(size[stay].sum()) for size, stay in zip(sizes, stays, strict=True)]
        if meter.after(layers, floor) - (meter.total(layers) - remove) > meter.grain(layers):
            least = [meter.us(units, kept) for units, kept in zip(layers, floor, strict=True)]
            raise self._unreachable(layers, least, meter.after(layers, floor))
        return []

    def growth(self, layers: Sequence[Units], meter: Meter, add: float, given: Scores | None) -> list[Tensor]:
        """For each layer, which of its entries that are gone come back (bool) if ``add`` of the cost does."""
        entries = [units.gone(score) for units, score in zip(layers, in_order(layers, given), strict=True)]
        sizes = [of_layer.unit_sizes() for of_layer in entries]
        if given is None:
            scores = [random_scores(len(of_layer), self.generator) for of_layer in sizes]
        else:
            scores = [of_layer.unit_worth() for of_layer in entries]
        if self.scope == "layer":
            triples = zip(scores, sizes, layers, strict=True)
            order = [growth_ranks(score, size, units.num_kept, units.num_weights) for score, size, units in triples]
        else:
            kept = [units.num_kept for units in layers]
            order = scores if given is None else self._for_their_cost(layers, entries, scores, meter, kept)
        if isinstance(meter, Linear):
            costs = [meter.marginal(units, of_layer) for units, of_layer in zip(layers, entries, strict=True)]
            chosen = choose_growth(order, costs, add)
        else:
            chosen = _grow_timed(layers, order, sizes, meter, add)
        return [units[of_layer.unit] for units, of_layer in zip(chosen, entries, strict=True)]

    def floors(self, layers: Sequence[Units]) -> list[float]:
        """Weights that every layer keeps at least."""
        return [self.floor * units.num_weights for units in layers]

    def _unreachable(self, layers: Sequence[Units], least: list[float], total: float) -> Unreachable:
        return Unreachable(total, layers[least.index(max(least))].name, self.floor)

    def _scores(self, entries: list[Entries], sizes: list[Tensor], given: Scores | None) -> list[Tensor]:
        if given is not None:
            return [of_layer.unit_worth() for of_layer in entries]
        if self.score == "random":
            return [random_scores(len(of_layer), self.generator) for of_layer in sizes]
        scores = [of_layer.unit_worth().sqrt() for of_layer in entries]  # root mean squares
        if self.score == "lamp":
            return [lamp_scores(score, size) for score, size in zip(scores, sizes, strict=True)]
        return scores

    def _for_their_cost(
        self, layers: Sequence[Units], entries: list[Entries], worth: list[Tensor], meter: Meter, kept: list[int]
    ) -> list[Tensor]:
        """The order in which units go: by what they are worth, or under scope "cost" by that for their cost."""
        if self.scope != "cost":
            return worth
        order = []
        for units, of_layer, score, count in zip(layers, entries, worth, kept, strict=True):
            costs = meter.marginal(units, of_layer, score, count) / of_layer.unit_sizes()
            order.append(torch.where(costs > 0, score / costs.clamp(min=1e-300), FREE))
        return order

    def _choose_timed(
        self,
        layers: Sequence[Units],
        order: list[Tensor],
        sizes: list[Tensor],
        stays: list[Tensor],
        meter: Timed,
        remove: float,
    ) -> list[Tensor]:
        stay = torch.cat(stays)
        first = weakest_first(torch.cat(order))
        candidates = first[~stay[first]]
        count = _nearest(meter, layers, sizes, candidates, -1, meter.total(layers) - remove)
        keep = torch.ones(len(stay), dtype=torch.bool)
        keep[candidates[:count]] = False
        chosen = list(keep.split([len(of_layer) for of_layer in sizes]))
        if self.scope == "cost":  # what would not make its layer faster stays: that costs nothing
            for index, (units, size) in enumerate(zip(layers, sizes, strict=True)):
                if not meter.gains(units, int(size[chosen[index]].sum())):
                    chosen[index] = torch.ones_like(chosen[index])
        return chosen


def _grow_timed(
    layers: Sequence[Units], order: list[Tensor], sizes: list[Tensor], meter: Timed, add: float
) -> list[Tensor]:
    best_first = weakest_first(torch.cat(order)).flip(0)
    count = _nearest(meter, layers, sizes, best_first, 1, meter.total(layers) + add)
    comes = torch.zeros(len(best_first), dtype=torch.bool)
    comes[best_first[:count]] = True
    return list(comes.split([len(of_layer) for of_layer in sizes]))


def _nearest(
    meter: Timed, layers: Sequence[Units], sizes: list[Tensor], units: Tensor, sign: int, wanted: float
) -> int:
    """How many of the units, in their order, have to come (``sign`` 1) or go (-1) until the time is nearest to
    ``wanted``. Found by halves: each reads half as many units as the one before."""
    owner = torch.cat([torch.full((len(of_layer),), index) for index, of_layer in enumerate(sizes)])[units]
    moved = torch.cat(sizes)[units].double() * sign

    def with_more(kept: Tensor, low: int, high: int) -> Tensor:
        return kept.index_add(0, owner[low:high], moved[low:high])

    def distance(kept: Tensor) -> float:  # below 0 as long as more units have to be moved
        return sign * (meter.after(layers, kept.tolist()) - wanted)

    low, high = 0, len(units)
    kept = torch.tensor([float(each.num_kept) for each in layers], dtype=torch.float64)  # after the first `low`
    while low < high:  # the first count that reaches it
        middle = (low + high) // 2
        until_middle = with_more(kept, low, middle)
        if distance(until_middle) >= 0:
            high = middle
        else:
            low, kept = middle + 1, with_more(until_middle, middle, middle + 1)
    if low:
        one_less = kept.index_add(0, owner[low - 1 : low], -moved[low - 1 : low])
        low -= abs(distance(one_less)) < abs(distance(kept))
    return low


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


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Pruner: {name} must be one of {', '.join(allowed)}, got {value!r}")
