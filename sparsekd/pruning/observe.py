"""One pass over an example, with hooks: which layer feeds which batch norm, and how often each weight is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd as Transposed
from torch.nn.utils.rnn import PackedSequence

from ..conversion import DENSE_TYPES, SPARSE_TYPES, named_layers, report, survey
from ..freeze.call import Example, call_arguments, tensors_in
from ..modes import evaluation_mode, uncompiled
from ..nn import BlockSparseLayer, SparseMultiheadAttention
from .batch_norm import FedBatchNorms

_SEQUENCES = (nn.MultiheadAttention, nn.RNNBase)  # what may take time before the batch
# Attributes of torch's modules that let them run as one call, and what keeps them from it: see nn/attention.py.
_FUSED = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


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
    """Run the model once, in eval mode and without a trace left.

    The first dimension of the first tensor, which may lie in a list or mapping, is taken for the batch. It is not where
    the first layer that is called shows another: a convolution or linear layer that gets all of that tensor without a
    batch, and an attention or recurrent layer that gets it as it is and takes time first.
    """
    first = next((x for x in tensors_in([*args, *kwargs.values()]) if x.dim()), None)
    uses: dict[str, float] = {}
    told: list[int | None] = []

    def count(name: str, layer: Any, given: Tensor, output: Tensor) -> None:
        moves_over = given if _is_transposed(layer) else output
        uses[name] = uses.get(name, 0.0) + moves_over.numel() / weight_shape(layer)[0]

    def tell(layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if not told:
            packed = next((x for x in (*args, *kwargs.values()) if isinstance(x, PackedSequence)), None)
            told.append(_examples(layer, _given(args, kwargs), first) if packed is None else int(packed.batch_sizes[0]))

    fed = FedBatchNorms(model, layers)
    hooks = [
        *fed.hooks,
        *(
            layer.register_forward_hook(
                lambda module, args, kwargs, output, name=name: count(name, module, _given(args, kwargs), output),
                with_kwargs=True,
            )
            for name, layer in layers.items()
        ),
        *(
            module.register_forward_pre_hook(tell, with_kwargs=True)
            for module in model.modules()
            if isinstance(module, (*DENSE_TYPES, *SPARSE_TYPES, *_SEQUENCES))
        ),
    ]
    try:
        with evaluation_mode(model), _calling_every_layer(model):
            uncompiled(model)(*args, **kwargs)  # what is compiled already may pass by the hooks
    finally:
        for hook in hooks:
            hook.remove()
    examples = told[0] if told else None
    if examples is None:
        examples = 1 if first is None else first.shape[0]
    return Seen(fed.found(), {name: used / max(examples, 1) for name, used in uses.items()})


def count_weights(model: nn.Module, exclude: Sequence[str] | None = None) -> tuple[int, int]:
    """Weights (when dense, now) of the layers that are, or can be, block-sparse."""
    layers: list[Any] = [layer for _, layer in named_layers(model, (*DENSE_TYPES, *SPARSE_TYPES), None, exclude)]
    sizes = [math.prod(weight_shape(layer)) for layer in layers]
    kept = (getattr(layer, "num_kept", size) for layer, size in zip(layers, sizes, strict=True))
    return sum(sizes), sum(kept)


def count_macs(model: nn.Module, example_inputs: Example, exclude: Sequence[str] | None = None) -> tuple[float, float]:
    """Multiply-adds for one example (when dense, now) of the layers that are, or can be, block-sparse.

    The batch must be the first dimension of the first tensor, as with ``batch_first=True``. Otherwise, and unless the
    first layer shows it (:func:`observe`), only the quotient of the two numbers is right, and not they themselves.

    Raises ValueError for a layer that the example never called, as ``Pruner.prune_to`` does. One that ``sparsify``
    leaves dense, such as the output projection of an attention with a forward pass of its own, is passed by.
    """
    layers: dict[str, Any] = dict(named_layers(model, (*DENSE_TYPES, *SPARSE_TYPES), None, exclude))
    uses = observe(model, layers, *call_arguments(example_inputs)).uses
    if layers.keys() - uses.keys():
        stay_dense = report(survey(model, None, None, exclude)).dense
        check_called("sparsekd.count_macs", [name for name in layers if name not in stay_dense], uses)
    sizes = {name: math.prod(weight_shape(layer)) for name, layer in layers.items()}
    kept = {name: getattr(layer, "num_kept", sizes[name]) for name, layer in layers.items()}
    dense, now = (sum(used * counts[name] for name, used in uses.items()) for counts in (sizes, kept))
    return float(dense), float(now)


def check_called(caller: str, names: Sequence[str], uses: Collection[str]) -> None:
    """Raise ValueError for the first of these layers that no example has used."""
    for name in names:
        if name not in uses:
            raise ValueError(
                f"{caller}: the example never called layer {name!r}, so its multiply-adds are unknown; give an example "
                f"that does, or leave it dense with exclude=[{name!r}]"
            )


def weight_shape(layer: Any) -> tuple[int, ...]:
    return tuple(layer.weight_shape if isinstance(layer, BlockSparseLayer) else layer.weight.shape)


def _is_transposed(layer: nn.Module) -> bool:
    dense = layer.dense_type if isinstance(layer, BlockSparseLayer) else type(layer)
    return issubclass(dense, Transposed)


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first tensor that a layer was given, by position or by keyword."""
    return next(tensors_in([*args, *kwargs.values()]), None)


def _examples(layer: Any, given: Any, first: Tensor | None) -> int | None:
    """How many examples the first tensor of a call holds, as far as the first layer that is called shows it."""
    if not isinstance(given, Tensor) or first is None:
        return None
    if not isinstance(layer, _SEQUENCES):
        shape = layer.weight_shape[2:] if isinstance(layer, BlockSparseLayer) else getattr(layer, "kernel_size", ())
        without_batch = given.dim() == len(shape) + 1
        return 1 if without_batch and given.numel() == first.numel() else None
    if given.shape != first.shape or (given.dim() == 3 and layer.batch_first):
        return None
    return given.shape[1] if given.dim() == 3 else 1


@contextmanager
def _calling_every_layer(model: nn.Module) -> Iterator[None]:
    """torch's attention and encoder layers call the layers inside them, as they do as soon as one is block-sparse.

    What is dense would otherwise multiply with the weights of its layers in one fused call, past all hooks.
    """
    before: list[tuple[Any, str, Any]] = []
    try:
        for module in model.modules():
            if type(module) is nn.MultiheadAttention:
                before.append((module, "__class__", nn.MultiheadAttention))
                module.__class__ = SparseMultiheadAttention
            for kind, name, off in _FUSED:
                if isinstance(module, kind) and name in vars(module):
                    before.append((module, name, vars(module)[name]))
                    setattr(module, name, off)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
