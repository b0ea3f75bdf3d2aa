"""What units are worth before a student has learnt anything: saliencies of some batches, which leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import distributed
from ..distill import Losses
from ..pruning import Pruner
from .saliency import saliency

FirstScore = Literal["snip", "taylor", "fisher"]
FIRST_SCORES = ("snip", "taylor", "fisher")


def first_scores(
    pruner: Pruner,
    beside: nn.Module,
    loss: Callable[..., Losses],
    batches: Iterable[Sequence[Any]],
    score: FirstScore,
) -> dict[str, Tensor]:
    """Scores for ``Pruner.prune_to`` by the loss of these batches, of all ranks together.

    beside: what trains beside the pruner's model; both keep their buffers, and have no gradients afterwards.

    Raises ValueError without batches, for masks on dense layers, and where a layer has no score: no gradient reaches
    it, or all of its weights are 0.
    """
    if not pruner.makes_faster:
        raise ValueError(
            f"sparsekd.methods: first_score={score!r} judges blocks, got granularity 'unstructured'; leave it out"
        )
    batches = list(batches)
    if not batches:
        raise ValueError(
            f"sparsekd.methods: first_score={score!r} needs some batches; call before_training(batches) with what loss "
            "takes"
        )
    with _without_a_trace(pruner.model, beside):
        found = saliency(pruner, [partial(_total, loss, batch) for batch in batches], score)
    device = next(pruner.model.parameters()).device  # a process group of GPUs adds up nothing else
    scores = {name: distributed.total(of_layer.to(device)).cpu() for name, of_layer in found.items()}
    untouched = [name for name, of_layer in scores.items() if not bool(of_layer.any())]
    if untouched:
        raise ValueError(
            f"sparsekd.methods: {_why(untouched, pruner)}, so that first_score={score!r} says nothing of it; a last "
            "layer of zeros passes no gradient to what lies before it: leave first_score out, to go by score"
        )
    return scores


def _why(untouched: list[str], pruner: Pruner) -> str:
    """A score is made of w g: which of the two is 0 in each of these layers."""
    layers = pruner.layers()
    zeros = [name for name in untouched if not bool(layers[name].values.any())]
    unreached = [name for name in untouched if name not in zeros]
    said = [f"no gradient reaches {', '.join(unreached)}"] if unreached else []
    said += [f"all weights of {', '.join(zeros)} are 0"] if zeros else []
    return " and ".join(said)


def _total(loss: Callable[..., Losses], batch: Sequence[Any]) -> Tensor:
    return loss(*batch).total


@contextmanager
def _without_a_trace(*networks: nn.Module) -> Iterator[None]:
    """Running statistics and gradients are as if nothing had been, afterwards."""
    buffers = [buffer for network in networks for buffer in network.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        for network in networks:
            network.zero_grad()
