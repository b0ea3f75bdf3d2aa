"""One pass over an example, with hooks: which layer feeds which batch norm, and how often each weight is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd as Transposed

from ..conversion import DENSE_TYPES, SPARSE_TYPES, named_layers
from ..freeze.call import Example, call_arguments, tensors_in
from ..modes import evaluation_mode
from ..nn import BlockSparseLayer
from .batch_norm import FedBatchNorms


@dataclass(frozen=True)
class Seen:
    """What an example has shown.

    batch_norms: batch norm -> the layers that feed it.
    uses: layer -> multiply-adds of each of its weights for one example: pixels of the output of a convolution. A layer
        that was not called is not in it.
    """

    batch_norms: dict[str, list[str]]
    uses: dict[str, float]


@torch.no_grad()
def observe(model: nn.Module, layers: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """Run the model once, in eval mode and without a trace left. The first dimension of the first tensor, which may lie
    in a list or mapping, is the batch."""
    batch = next((x.shape[0] for x in tensors_in([*args, *kwargs.values()]) if x.dim()), 1)
    uses: dict[str, float] = {}

    def count(name: str, layer: Any, given: Tensor, output: Tensor) -> None:
        moves_over = given if _is_transposed(layer) else output
        uses[name] = uses.get(name, 0.0) + moves_over.numel() / weight_shape(layer)[0] / max(batch, 1)

    fed = FedBatchNorms(model, layers)
    hooks = [
        *fed.hooks,
        *(
            layer.register_forward_hook(lambda module, args, output, name=name: count(name, module, args[0], output))
            for name, layer in layers.items()
        ),
    ]
    try:
        with evaluation_mode(model):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(fed.found(), uses)


def count_weights(model: nn.Module, exclude: Sequence[str] | None = None) -> tuple[int, int]:
    """Weights (when dense, now) of the layers that are, or can be, block-sparse."""
    layers: list[Any] = [layer for _, layer in named_layers(model, (*DENSE_TYPES, *SPARSE_TYPES), None, exclude)]
    sizes = [math.prod(weight_shape(layer)) for layer in layers]
    kept = (getattr(layer, "num_kept", size) for layer, size in zip(layers, sizes, strict=True))
    return sum(sizes), sum(kept)


def count_macs(model: nn.Module, example_inputs: Example, exclude: Sequence[str] | None = None) -> tuple[float, float]:
    """Multiply-adds for one example (when dense, now) of the layers that are, or can be, block-sparse."""
    layers: dict[str, Any] = dict(named_layers(model, (*DENSE_TYPES, *SPARSE_TYPES), None, exclude))
    uses = observe(model, layers, *call_arguments(example_inputs)).uses
    sizes = {name: math.prod(weight_shape(layer)) for name, layer in layers.items()}
    kept = {name: getattr(layer, "num_kept", sizes[name]) for name, layer in layers.items()}
    dense, now = (sum(used * counts[name] for name, used in uses.items()) for counts in (sizes, kept))
    return float(dense), float(now)


def weight_shape(layer: Any) -> tuple[int, ...]:
    return tuple(layer.weight_shape if isinstance(layer, BlockSparseLayer) else layer.weight.shape)


def _is_transposed(layer: nn.Module) -> bool:
    dense = layer.dense_type if isinstance(layer, BlockSparseLayer) else type(layer)
    return issubclass(dense, Transposed)
