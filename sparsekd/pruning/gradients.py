"""Gradients of weights that do not exist: what the blocks that are gone would do, had they stayed at zero."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockPattern, BlockSparse
from ..convert import sparse_layer
from ..distributed import total
from ..nn import BlockSparseLayer
from .pruner import Pruner
from .scores import energies, picture


class DenseGradients:
    """Scores for ``Pruner.grow_to`` and ``Pruner.exchange``: gradients of the whole dense weights, summed over steps.

        with DenseGradients(pruner) as gradients:        # while it is open, every step computes dense gradients too
            for inputs, target in batches:
                loss_fn(model(*inputs), target).backward()
        pruner.exchange(0.3, gradients.scores())

    Evci et al., Rigging the Lottery, ICML 2020, take the gradient of one batch. The sum over several favours no single
    batch, and what only jitters around zero cancels out. On several ranks the scores are those of all of them.
    """

    def __init__(self, pruner: Pruner) -> None:
        self._layers = pruner.layers()
        # Of the same geometry, without the hooks of the layers themselves.
        self._dense = {name: _dense_twin(layer) for name, layer in self._layers.items()}
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> DenseGradients:
        self._sums = {}
        self._hooks = [layer.register_forward_hook(partial(self._watch, name)) for name, layer in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def scores(self) -> dict[str, Tensor]:
        """Layer's name -> root mean square of the summed gradients in each block, in the shape of ``Pruner.masks``."""
        missing = [name for name in self._layers if name not in self._sums]
        if missing:
            raise RuntimeError(
                f"DenseGradients.scores: no gradient has reached {', '.join(missing)}; call backward() inside "
                "`with DenseGradients(pruner)`"
            )
        return {name: self._of_blocks(name, total(gradient)) for name, gradient in self._sums.items()}

    def _watch(self, name: str, layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            x = args[0].detach()
            output.register_hook(lambda gradient: self._add(name, _weight_gradient(self._dense[name], x, gradient)))

    def _add(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient

    def _of_blocks(self, name: str, gradient: Tensor) -> Tensor:
        layer = self._layers[name]
        if not isinstance(layer, BlockSparseLayer):
            return gradient.abs()
        blocks = BlockSparse.from_dense(gradient.reshape(layer.matrix_shape), layer.pattern)
        return picture((energies(blocks.values) / blocks.block_sizes().cpu()).sqrt(), blocks)


def _dense_twin(layer: nn.Module) -> nn.Module:
    sparse = layer if isinstance(layer, BlockSparseLayer) else sparse_layer(layer, BlockPattern(1, 1))
    dense: Any = sparse.to_dense()
    dense.bias = None
    return dense


def _weight_gradient(dense: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Of the weight of a layer that is linear in it, so that any weight does: torch knows how, for every kind."""
    weight = torch.zeros_like(dense.weight, dtype=x.dtype, requires_grad=True)  # type: ignore[arg-type]
    with torch.enable_grad():
        output = torch.func.functional_call(dense, {"weight": weight}, (x,))
    return torch.autograd.grad(output, weight, gradient.to(output.dtype))[0]
