"""What blocks are worth by the loss: scores for a Pruner, from some batches of the data that it is to serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from ..nn import BlockSparseLayer
from ..pruning import Pruner
from ..pruning.scores import energies, picture

Criterion = Literal["fisher", "taylor", "snip", "both", "magnitude"]
CRITERIA = ("fisher", "taylor", "snip", "both", "magnitude")


def saliency(pruner: Pruner, losses: Iterable[Callable[[], Tensor]], criterion: Criterion) -> dict[str, Tensor]:
    """Layer's name -> score of every block for each weight in it, in the shape of ``Pruner.masks``.

    losses: each computes the loss of one batch with the model of the pruner, whose gradients are used up.

    "fisher"     sum of w^2 g^2 over batches: half of it is what removing a weight adds to the loss, by the diagonal of
                 the empirical Fisher matrix in the place of the Hessian (LeCun et al. 1990; Theis et al.,
                 arXiv 1801.05787). Comparable over layers as it is.
    "taylor"     (sum of w g over the block)^2 over batches (Molchanov et al., arXiv 1906.10771).
    "snip"       sum of |w g| over batches: how much gates on its weights would matter (Lee et al., arXiv 1810.02340,
                 equation 5, not divided by the sum over the network). Meant for weights that are not trained yet.
    "both"       z(|w|) + z(|w g|), each brought to mean 0 and variance 1 over the layer.
    "magnitude"  root mean square of the weights.
    """
    layers = pruner.layers()
    if criterion == "magnitude":
        return {name: _picture(layer, energies(layer.values)).sqrt() for name, layer in layers.items()}
    sums = {name: torch.zeros(len(layer.values), dtype=torch.float64) for name, layer in layers.items()}
    for loss in losses:
        pruner.model.zero_grad()
        loss().backward()
        for name, layer in layers.items():
            if layer.values.grad is not None:
                sums[name] += _of_blocks((layer.values * layer.values.grad).detach().double(), criterion).cpu()
    pruner.model.zero_grad()
    if criterion != "both":
        return {name: _picture(layer, sums[name]) for name, layer in layers.items()}
    scores = {}
    for name, layer in layers.items():
        size = layer.blocks.block_sizes().cpu()
        parts = (energies(layer.values) / size).sqrt(), (sums[name] / size).sqrt()
        scores[name] = picture(_standard(parts[0]) + _standard(parts[1]), layer.blocks)
    return scores


def _of_blocks(products: Tensor, criterion: Criterion) -> Tensor:
    """``[nnzb]``, what one batch says of every block by w g of its weights, ``[nnzb, bh, bw]``."""
    if criterion == "snip":
        return products.abs().sum((1, 2))
    return products.sum((1, 2)).square() if criterion == "taylor" else products.square().sum((1, 2))


def _picture(layer: BlockSparseLayer, of_blocks: Tensor) -> Tensor:
    return picture(of_blocks.cpu() / layer.blocks.block_sizes().cpu(), layer.blocks)


def _standard(numbers: Tensor) -> Tensor:
    return (numbers - numbers.mean()) / numbers.std(correction=0).clamp(min=1e-30)
