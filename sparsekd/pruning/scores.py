"""How much a unit matters, and which units go. Choosing is separate from scoring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import BlockSparse, tap_major
from ..nn import BlockSparseLayer

PIECE = 4096  # blocks


def magnitude_scores(layer: BlockSparseLayer) -> Tensor:
    """``[nnzb]`` float64 on the CPU: root mean square of the weights in each kept block.

    The L2 norm over the square root of the block's real size: blocks of different sizes (the ragged last ones, other
    layers' patterns) are judged by how large their weights are, not by how many they have. For equal blocks it ranks as
    the L2 norm does, for single weights as their magnitude.
    """
    return (energies(layer.values) / layer.blocks.block_sizes().cpu()).sqrt()


def random_scores(count: int, generator: torch.Generator | None = None) -> Tensor:
    """``[count]`` float64, uniform in [0, 1): the control that shows what choosing by magnitude is worth."""
    return torch.rand(count, dtype=torch.float64, generator=generator)


def lamp_scores(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """``[units]``: magnitude^2 over the energy of the layer once all weaker units are gone.

    LAMP (Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, equation 5), a unit's weights
    taken as equal. It ranks the units of a layer as their magnitude does, but does not change when the layer is scaled.
    Magnitudes alone, compared over layers, first of all compare fan-in: the blocks of one layer differ little as long
    as it is hardly trained, and the layer of the widest inputs can go almost whole.
    """
    strongest_first = magnitudes.argsort(descending=True, stable=True)
    squares = magnitudes[strongest_first].square()
    energy_left = (squares * sizes[strongest_first]).cumsum(0)
    scores = torch.empty_like(magnitudes)
    scores[strongest_first] = squares / energy_left.clamp(min=torch.finfo(magnitudes.dtype).tiny)
    return scores


def layer_ranks(scores: Tensor, sizes: Tensor, num_weights: int) -> Tensor:
    """``[units]`` in (0, 1): the share of the layer's original weights that is gone once this unit is half removed.

    Choosing by rank instead of score removes the same share, to one unit, from every layer.
    """
    order = weakest_first(scores)
    ranks = torch.empty(len(scores), dtype=torch.float64)
    gone_before = num_weights - int(sizes.sum())
    ranks[order] = (gone_before + sizes[order].cumsum(0) - sizes[order] / 2).double() / num_weights
    return ranks


def growth_ranks(scores: Tensor, sizes: Tensor, num_kept: int, num_weights: int) -> Tensor:
    """``[units]`` in (-1, 0): minus the share of the layer's original weights there is once this unit is half back.

    Choosing by rank instead of score brings every layer to the same share, to one unit.
    """
    order = weakest_first(scores).flip(0)
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[order] = -(num_kept + sizes[order].cumsum(0) - sizes[order] / 2).double() / num_weights
    return ranks


def choose_units(
    scores: Sequence[Tensor], sizes: Sequence[Tensor], remove: float, stays: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Which units of each layer to keep (bool ``[units]``) so that what is removed comes nearest to ``remove``.

    The lowest scores go first, over all layers; among equals the later one. The best unit of every layer stays, however
    low its score: then the other layers give more, so that the total still holds, exact to one unit.

    Args:
        scores, sizes: for each layer ``[units]``, on the CPU: what a unit is worth, and its weights, or its cost.
        remove: weights, or cost, to remove.
        stays: for each layer bool ``[units]``, those that stay in any case; default: the best one.

    Raises:
        ValueError: for a score that is not finite, and if ``remove`` would empty a layer.
    """
    every_score, every_size = torch.cat(list(scores)), torch.cat(list(sizes))
    stay = torch.cat(
        [strongest(*of_layer, 0.0) for of_layer in zip(scores, sizes, strict=True)] if stays is None else list(stays)
    )
    order = weakest_first(every_score)
    candidates = order[~stay[order]]
    removed = torch.cat([every_size.new_zeros(1), every_size[candidates].cumsum(0)])
    if remove - float(removed[-1]) >= float(every_size.max()):
        raise ValueError(
            f"sparsekd.choose_units: at most {float(removed[-1]):.10g} of {float(every_size.sum()):.10g} weights can "
            f"go, one unit of each layer stays; got {remove:.0f} to remove; remove less, or use smaller blocks"
        )
    count = int((removed.double() - remove).abs().argmin())
    keep = torch.ones(len(every_score), dtype=torch.bool)
    keep[candidates[:count]] = False
    return list(keep.split([len(layer) for layer in scores]))


def strongest(scores: Tensor, sizes: Tensor, least: float) -> Tensor:
    """Bool ``[units]``: those of highest score, until they have ``least`` weights; one in any case."""
    stays = torch.zeros(len(scores), dtype=torch.bool)
    if least > 0:
        # So many could be needed if the smallest were the strongest; they are few, and the others need no order.
        most = min(len(scores), int(least / max(int(sizes.min()), 1)) + 1)
        best_first = scores.topk(most).indices
        before = sizes[best_first].cumsum(0) - sizes[best_first]
        stays[best_first[before < least]] = True
    else:
        stays[scores.argmax()] = True
    return stays


def choose_growth(scores: Sequence[Tensor], sizes: Sequence[Tensor], add: float) -> list[Tensor]:
    """Which units of each layer come back (bool ``[units]``) so that the weights added come nearest to ``add``.

    The highest scores come first, over all layers; among equals the earlier one. ``scores`` and ``sizes`` are those of
    the units that are gone, as in :func:`choose_units`.
    """
    every_score, every_size = torch.cat(list(scores)), torch.cat(list(sizes))
    order = weakest_first(every_score).flip(0)
    added = torch.cat([every_size.new_zeros(1), every_size[order].cumsum(0)])
    comes = torch.zeros(len(every_score), dtype=torch.bool)
    comes[order[: int((added.double() - add).abs().argmin())]] = True
    return list(comes.split([len(layer) for layer in scores]))


def weakest_first(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise ValueError("sparsekd.pruning: expected finite scores, got NaN or infinity; look for diverged weights")
    return scores.argsort(descending=True, stable=True).flip(0)


def energies(values: Tensor) -> Tensor:
    """``[nnzb]`` float64 on the CPU: sum of squares of each block."""
    # In pieces that fit into the cache: as a whole its squares would be written to memory and read again.
    pieces = values.detach().cpu().split(PIECE)
    return torch.cat([piece.double().square().sum((1, 2)) for piece in pieces])


def picture(of_blocks: Tensor, blocks: BlockSparse) -> Tensor:
    """Numbers ``[nnzb]`` of the kept blocks in the shape of the block mask, 0 where none is kept."""
    mask = blocks.mask().cpu()
    shown = torch.zeros(mask.shape, dtype=of_blocks.dtype)
    tap_major(shown)[tap_major(mask)] = of_blocks  # a view: this writes to the picture
    return shown
