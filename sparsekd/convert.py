"""Swap the layers of a model, in place, by module name: dense to block-sparse and back."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .blocks import BlockPattern, check_density
from .conversion import (
    DENSE_TYPES,
    SPARSE_OF,
    SPARSE_TYPES,
    TABLE_OF,
    ConversionReport,
    Found,
    Pattern,
    named_layers,
    report,
    sparse_type,
    survey,
    table_type,
)
from .nn import BlockSparseLayer
from .nn.attention import follow_projection
from .nn.embedding_table import SparseTable

__all__ = [
    "DENSE_TYPES",
    "SPARSE_OF",
    "SPARSE_TYPES",
    "conversion_report",
    "densify",
    "named_layers",
    "replace_layers",
    "sparse_layer",
    "sparsify",
    "warn_of_unexpected",
]

# What a user may have hung on a layer: it moves to the layer that takes its place, handles and all.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_OF_THE_BLOCKS = ("pattern", "weight_shape", "matrix_shape")


def sparsify(
    model: nn.Module,
    pattern: Pattern = None,
    density: float = 1.0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> nn.Module:
    """Replace the layers of a model that have a block-sparse form by it, in place.

    These are ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, ``nn.ConvTranspose2d``, 1x1x1 ``nn.Conv3d``, the output
    projection of ``nn.MultiheadAttention``, and subclasses of them that inherit the forward pass. What else has a
    weight stays dense; a warning names what one would not expect, :func:`conversion_report` all of it. A model is
    converted whole, or refused before anything has changed.

    Args:
        model: changed in place and returned. A bare layer cannot be replaced in place: use ``from_dense``.
        pattern: block shape, or a function that gives it for a layer; default ``BlockPattern.for_device`` of each.
        density: share of each layer's blocks to keep (largest L2 norm), in (0, 1].
        include, exclude: names of modules, or shell-style patterns (``"stage1.*"``); a layer is converted if a pattern
            of ``include`` names it (default all) and none of ``exclude`` does.

    Layers that are block-sparse already are pruned further where ``density`` is lower than theirs, and stay as they are
    at density 1; one that is sparser than asked for, or in other blocks, is refused. A layer that the model holds under
    several names is replaced under all of them. Hooks and attributes of a layer move along.

    Unless ``include`` names them, these stay dense: ``nn.Embedding`` and ``nn.EmbeddingBag``, which keep the entries of
    largest magnitude (``density`` of them, at least one in every row) and no blocks; layers that share a weight, which
    would come apart; layers whose weight is computed (weight_norm, ``torch.nn.utils.prune``); and layers that sparsity
    would make slower: a grouped convolution whose groups are lower than a block (depthwise ones), and on a GPU, with
    blocks that its kernels take, a layer whose channels they do not take (the three of an image, ten classes).

    For inference torch runs a whole ``nn.TransformerEncoderLayer`` as one call on dense weights. One that holds a
    block-sparse layer takes the path of training instead, so that what ``src_key_padding_mask`` hides is not zeroed.
    """
    check_density("sparsekd.sparsify", density)
    kind = sparse_type(model) or table_type(model)
    if kind is not None:
        raise ValueError(
            f"sparsekd.sparsify: a bare layer cannot be replaced in place; use {kind.__name__}.from_dense(layer)"
        )
    surveyed = survey(model, pattern, include, exclude)
    wanted = [each for each in surveyed if each.kind is not None]
    for each in wanted:
        if not torch.isfinite(each.layer.weight.detach()).all():
            raise ValueError(
                f"sparsekd.sparsify: expected finite weights, got NaN or infinity in layer {each.name!r}; "
                "load a checkpoint from before the divergence"
            )
    if include is None:
        warn_of_unexpected(report(surveyed))
    further = [] if density == 1.0 else _pruned_further(model, pattern, density, include, exclude)
    if wanted or further:
        _check_not_wrapped(model)
    for layer, keep in further:
        layer.keep_(keep)
    twins = ((each.layer, _twin(each, pattern, density)) for each in wanted)
    replace_layers(model, twins)
    return model


def _twin(found: Found, pattern: Pattern, density: float) -> nn.Module:
    if found.kind is not None and issubclass(found.kind, SparseTable):
        return found.kind.from_dense(found.layer, density=density)
    return sparse_layer(found.layer, pattern(found.layer) if callable(pattern) else pattern, density=density)


def _pruned_further(
    model: nn.Module, pattern: Pattern, density: float, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[tuple[BlockSparseLayer, torch.Tensor]]:
    """(layer, bool ``[nnzb]``: the blocks of largest norm) of the layers that are block-sparse already."""
    smaller = []
    layers = list(named_layers(model, (*DENSE_TYPES, *SPARSE_TYPES, *TABLE_OF, *TABLE_OF.values()), include, exclude))
    for name, layer in layers:
        if include is not None and isinstance(layer, SparseTable):
            raise ValueError(
                f"sparsekd.sparsify: layer {name!r} is a packed table already, got density={density:g}; "
                "sparsekd.pruning.drop_entries prunes it on"
            )
    for name, layer in ((name, each) for name, each in layers if isinstance(each, BlockSparseLayer)):
        wanted = layer.pattern if callable(pattern) or pattern is None else pattern
        if wanted != layer.pattern:
            raise ValueError(
                f"sparsekd.sparsify: layer {name!r} has blocks of {layer.pattern} already, got pattern {wanted}; "
                "densify(model) first, or prune on in its own blocks"
            )
        kept, blocks = len(layer.col_idx), math.prod(layer.pattern.grid(layer.matrix_shape))
        count = max(1, round(density * blocks))
        if kept < count:
            raise ValueError(
                f"sparsekd.sparsify: layer {name!r} keeps {kept} of {blocks} blocks already, got density={density:g}; "
                "what is gone does not come back here: see Pruner.grow_to"
            )
        norms = layer.values.detach().float().square().sum((1, 2))
        keep = torch.zeros(kept, dtype=torch.bool, device=norms.device)
        keep[norms.argsort(descending=True, stable=True)[:count]] = True
        smaller.append((layer, keep))
    return smaller


def densify(model: nn.Module, tables: bool = True) -> nn.Module:
    """Replace every block-sparse layer, and if `tables` every packed table, by the torch layer with the same weight, in
    place."""
    if isinstance(model, (BlockSparseLayer, SparseTable)):
        raise ValueError("sparsekd.densify: a bare layer cannot be replaced in place; use layer.to_dense()")
    layers = [layer for _, layer in named_layers(model, SPARSE_TYPES)]
    layers += [module for module in model.modules() if tables and isinstance(module, SparseTable)]
    replace_layers(model, ((layer, layer.to_dense()) for layer in layers))
    return model


def conversion_report(
    model: nn.Module,
    pattern: Pattern = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> ConversionReport:
    """What is block-sparse in a model, what ``sparsify`` with these arguments would convert, what stays dense and why.

    Nothing is changed: ask before, or print it afterwards.

    >>> model = sparsify(nn.Sequential(nn.Conv1d(8, 16, 3), nn.Embedding(4, 2)), density=0.5)
    >>> print(conversion_report(model))
    layers: 1 block-sparse, 1 dense
      block-sparse      0  SparseConv1d(8, 16, kernel_size=(3,), stride=(1,), bias=True, pattern=16x1, density=0.5)
      dense             1  Embedding looks rows up; name it in include to keep single entries of them
    """
    return report(survey(model, pattern, include, exclude))


def sparse_layer(dense: nn.Module, pattern: BlockPattern | None = None, **options: Any) -> BlockSparseLayer:
    """The block-sparse layer that stands for a dense one; ``options`` as in its ``from_dense``."""
    kind = sparse_type(dense)
    if kind is None:
        raise TypeError(f"sparsekd: {type(dense).__name__} has no block-sparse form")
    return kind.from_dense(dense, pattern, **options)


def table_as(layer: Any, packed: bool) -> nn.Module:
    """An embedding, packed or dense, as the one or the other; itself where it is. Packed anew it keeps one entry a row,
    until its own are loaded.  ValueError, which says why, where no packed table can stand for it."""
    if packed == isinstance(layer, SparseTable):
        return layer
    kind = table_type(layer)
    if kind is None:
        return layer.to_dense()
    if refusal := kind.refusal(layer):
        raise ValueError(f"and no packed table can stand for {refusal.partition(';')[0]}")
    first = torch.zeros(layer.weight.shape, dtype=torch.bool, device=layer.weight.device)
    first[:, 0] = True
    return kind.from_dense(layer, mask=first)


def replace_layers(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Put the second of each pair in the place of the first, wherever the model holds it: under every name, and in the
    lists, tuples and dictionaries that its modules keep beside them. A layer paired with itself stays."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    replaced: dict[int, nn.Module] = {}
    gone: list[nn.Module] = []  # held, so that no id is used twice
    for old, new in pairs:
        if old is new:
            continue
        if not gone:
            _check_not_wrapped(model)
        _carry_over(old, new)
        for name in names[id(old)]:
            model.set_submodule(name, new)
        replaced[id(old)] = new
        gone.append(old)
    for module in list(model.modules()):
        follow_projection(module)
        for name, value in vars(module).items():
            if not name.startswith("_") and (other := _with_replaced(value, replaced)) is not value:
                setattr(module, name, other)


def _check_not_wrapped(model: nn.Module) -> None:
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "sparsekd: the model is in DistributedDataParallel, which would go on with parameters of layers that are "
            "replaced or pruned; convert the model first, then wrap it with sparsekd.distributed.data_parallel"
        )


def _with_replaced(value: Any, replaced: dict[int, nn.Module]) -> Any:
    """A container with the layers in it replaced: lists and dictionaries themselves, tuples as new ones."""
    if type(value) is list:
        value[:] = [replaced.get(id(each), each) for each in value]
    elif type(value) is dict:
        value.update({key: replaced[id(each)] for key, each in value.items() if id(each) in replaced})
    elif type(value) is tuple and any(id(each) in replaced for each in value):
        return tuple(replaced.get(id(each), each) for each in value)
    return value


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    for name, value in vars(old).items():
        if not name.startswith("_") and name not in vars(new) and name not in _OF_THE_BLOCKS:
            setattr(new, name, value)


def warn_of_unexpected(found: ConversionReport) -> None:
    """Tell whoever called the package what stays dense against expectation."""
    if not found.unexpected and (found.sparse or found.convertible):
        return
    reasons = "; ".join(f"{name or 'the model'}: {found.dense[name]}" for name in found.unexpected[:8])
    more = f"; and {len(found.unexpected) - 8} more" if len(found.unexpected) > 8 else ""
    first = "" if found.sparse or found.convertible else "no layer can be block-sparse. "
    count = len(found.unexpected)
    layers = "1 layer stays" if count == 1 else f"{count} layers stay"
    stay = f"{layers} dense: {reasons}{more}. " if count else ""
    warnings.warn(
        f"sparsekd.sparsify: {first}{stay}sparsekd.conversion_report(model) lists every layer; exclude=[...] says "
        "that it is meant",
        stacklevel=_frames_of_the_package(),
    )


def _frames_of_the_package() -> int:
    """How far up the stack the first line lies that is not ours, for a caller's `warnings.warn`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "sparsekd":
        frame, level = frame.f_back, level + 1
    return level
