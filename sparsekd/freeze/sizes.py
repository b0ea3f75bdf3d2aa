"""Which sizes of its inputs a network may be called with beside the batch: images, sequences, volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .outputs import deviation
from .sites import clone

# Growth of a side that is tried: one that keeps what divides by 32 dividing, and one that does not.
_STEPS = (32, 5)


def free_sizes(
    model: Callable[..., Any], network: Callable[..., Any], inputs: tuple[Tensor, ...], tolerance: float | None
) -> list[list[int]]:
    """For each input, the dimensions in which later calls may differ from the example, besides the first.

    Found by trying: the model takes larger inputs, and its trace computes the same of them. Where one step suits a
    model and another does not (it cuts images into patches), the dimension is free if the trace is right wherever the
    model runs.
    """
    for dims in _candidates(inputs):
        if any(dims) and _agree(model, network, inputs, dims, tolerance):
            return dims
    return [[] for _ in inputs]


def _candidates(inputs: tuple[Tensor, ...]) -> Iterator[list[list[int]]]:
    images = [list(range(2, x.dim())) if x.dim() in (4, 5) else [] for x in inputs]
    yield images
    lengths = {x.shape[1] for x in inputs if _is_sequence(x)}
    if len(lengths) == 1:
        (length,) = lengths
        yield [[i for i in range(1, x.dim()) if x.shape[i] == length] if x.dim() > 1 else [] for x in inputs]
        yield [[1] if _is_sequence(x) else [] for x in inputs]
    yield [[2] if x.dim() == 3 else [] for x in inputs]


def _is_sequence(x: Tensor) -> bool:
    """[B, T] of numbers of words, or [B, T, D]."""
    return (x.dim() == 2 and not x.is_floating_point()) or x.dim() == 3


def _agree(
    model: Callable[..., Any],
    network: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    dims: list[list[int]],
    tolerance: float | None,
) -> bool:
    ran = False
    for step in _STEPS:
        grown = tuple(_grown(x, which, step) for x, which in zip(inputs, dims, strict=True))
        try:
            want = model(*clone(grown))
        except Exception:  # the model does not take this size
            continue
        try:
            got = network(*clone(grown))
        except Exception:
            return False
        if not deviation(got, want, tolerance) <= 1.0:
            return False
        ran = True
    return ran


def _grown(x: Tensor, dims: list[int], step: int) -> Tensor:
    """With its own values repeated: numbers of words stay in their range."""
    for dim in dims:
        size = x.shape[dim]
        if size:
            x = x.index_select(dim, torch.arange(size + step, device=x.device) % size)
    return x


__all__ = ["free_sizes"]
