"""A model that is pruned once, without training: to a density of every layer, or to a budget of the whole network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from .. import convert
from ..conversion import SPARSE_TYPES, Pattern, named_layers
from ..freeze.call import Example
from .budget import UNITS, Budget
from .cost import CostTable
from .pruner import Pruner


def sparsify(
    model: nn.Module,
    pattern: Pattern = None,
    density: float = 1.0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    weights: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    latency_us: float | None = None,
    example_inputs: Example | None = None,
    scope: Literal["cost", "global", "layer"] = "cost",
    score: Literal["magnitude", "lamp"] | None = None,
    floor: float | None = None,
    costs: CostTable | None = None,
) -> nn.Module:
    """Replace the layers of a model that have a block-sparse form by it, in place.

        sparsify(model, density=0.3)                                 # 30 % of the blocks of every layer
        sparsify(model, macs=0.3, example_inputs=(x,))               # 30 % of the multiply-adds of the network
        sparsify(model, latency_us=80, example_inputs=(x,))          # what takes 80 microseconds here when frozen

    With a density it is :func:`sparsekd.convert.sparsify`, which says what is converted and what stays dense: the
    density counts weights, in every layer alike. With a budget the blocks are chosen over the whole network, and layers
    that keep all of theirs stay dense. With neither, layers are converted and all blocks kept: nothing is removed. A
    model that is block-sparse already is pruned further. Layers that are replaced have new parameters: make optimizers
    afterwards.

    Args:
        model, pattern, density, include, exclude: as in ``convert.sparsify``.
        weights, macs, bytes, latency_us: what stays, instead of a density. A number up to 1 is a share of the layers
            that can be pruned (of microseconds: of the whole network), a number above is absolute.
        example_inputs: a tensor, a tuple, or a mapping of keyword arguments, needed for a budget. ``latency_us`` is
            that of its batch size.
        scope: ``"cost"`` keeps what is worth most for its cost in the budget's unit, ``"global"`` the largest weights,
            ``"layer"`` the same share of every layer. See ``Pruner``, as for ``score`` and ``floor``.
        costs: of a :class:`CostTable`; default for ``latency_us``: measured now, with the threads of torch.

    Raises:
        ValueError: for two budgets, or one that cannot be met: nothing has changed then.
    """
    numbers = {"weights": weights, "macs": macs, "bytes": bytes, "latency_us": latency_us}
    if all(number is None for number in numbers.values()):
        return convert.sparsify(model, pattern, density, include, exclude)
    budget = Budget.of("sparsekd.sparsify", False, **numbers)
    if density != 1.0:
        raise ValueError(
            f"sparsekd.sparsify: a density is a budget of weights in every layer, got density={density:g} and {budget}"
        )
    if example_inputs is None:
        raise ValueError(f"sparsekd.sparsify: {UNITS[budget.unit]} are those of an example; give example_inputs=(x,)")
    if budget.unit == "latency_us" and costs is None:
        costs = CostTable.measure(model, example_inputs, pattern=pattern, include=include, exclude=exclude)
    options: dict[str, Any] = {"pattern": pattern, "include": include, "exclude": exclude, "rewindable": False}
    options |= {"scope": scope, "score": score, "floor": floor, "costs": costs, "example_inputs": example_inputs}
    was_sparse = {name for name, _ in named_layers(model, SPARSE_TYPES)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model itself warns
        Pruner(copy.deepcopy(model), **options).prune_to(budget)  # if it cannot be, the copy says so
    pruner = Pruner(model, **options)
    pruner.prune_to(budget)
    whole = ((name, layer) for name, layer in pruner.layers().items() if layer.num_kept == layer.num_weights)
    convert.replace_layers(model, ((layer, layer.to_dense()) for name, layer in whole if name not in was_sparse))
    return model
