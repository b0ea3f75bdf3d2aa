"""Swap the layers of a model, in place, by module name: dense to block-sparse and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .backends import cuda
from .blocks import BlockPattern, check_density
from .nn import BlockSparseLayer, SparseConv2d, SparseLinear

# The block-sparse layer that stands for each dense one. A layer that comes to the library is entered here.
SPARSE_OF: dict[type[nn.Module], type[BlockSparseLayer]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
DENSE_TYPES, SPARSE_TYPES = tuple(SPARSE_OF), tuple(SPARSE_OF.values())


def sparsify(
    model: nn.Module,
    pattern: BlockPattern | None = None,
    density: float = 1.0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> nn.Module:
    """Replace ``nn.Linear`` and ``nn.Conv2d`` layers by block-sparse ones, in place.

    Args:
        model: changed in place and returned. A bare layer cannot be replaced in place: use ``from_dense``.
        pattern: block shape; default ``BlockPattern.for_device`` of each layer.
        density: share of each layer's blocks to keep (largest L2 norm), in (0, 1].
        include, exclude: shell-style patterns on module names (``"stage1.*"``); a layer is converted if a pattern of
            ``include`` names it (default all) and none of ``exclude`` does.

    Layers that are block-sparse already stay as they are. A layer that the model holds under several names is replaced
    under all of them; a weight that two layers share cannot be (it would come apart), and is refused.
    Unless ``include`` names them, layers that sparsity would make slower stay dense: a grouped convolution whose groups
    are lower than a block (depthwise ones), and on a GPU, with blocks that its kernels take, a layer whose channels
    they do not take (the three of an image, ten classes).
    """
    check_density("sparsekd.sparsify", density)
    for dense, sparse in SPARSE_OF.items():
        if isinstance(model, dense):
            raise ValueError(
                f"sparsekd.sparsify: a bare layer cannot be replaced in place; use {sparse.__name__}.from_dense(layer)"
            )
    for name, layer in list(named_layers(model, DENSE_TYPES, include, exclude)):
        if include is None and not _fits(layer, pattern):
            continue
        _refuse_tied(model, name, layer)
        _replace(model, layer, sparse_layer(layer, pattern, density=density))
    return model


def sparse_layer(dense: nn.Module, pattern: BlockPattern | None = None, **options: Any) -> BlockSparseLayer:
    """The block-sparse layer that stands for a dense one; ``options`` as in its ``from_dense``."""
    return SPARSE_OF[type(dense)].from_dense(dense, pattern, **options)


def densify(model: nn.Module) -> nn.Module:
    """Replace every block-sparse layer by the torch layer with the same weight, in place."""
    for _, layer in list(named_layers(model, SPARSE_TYPES)):
        _replace(model, layer, layer.to_dense())
    return model


def named_layers(
    model: nn.Module,
    types: tuple[type, ...],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the layers of these exact types that ``include`` names and ``exclude`` does not."""
    layers = {name: module for name, module in model.named_modules() if type(module) in types}
    for wanted in include or ():
        if not any(fnmatchcase(name, wanted) for name in layers):
            raise ValueError(
                f"sparsekd: include pattern {wanted!r} names no {' or '.join(t.__name__ for t in types)} layer; "
                f"the model has {', '.join(layers) or 'none'}"
            )
    for unwanted in exclude or ():
        if not any(fnmatchcase(name, unwanted) for name, _ in model.named_modules()):
            raise ValueError(f"sparsekd: exclude pattern {unwanted!r} names no module of the model")
    for name, layer in layers.items():
        included = include is None or any(fnmatchcase(name, wanted) for wanted in include)
        if included and not any(fnmatchcase(name, unwanted) for unwanted in exclude or ()):
            yield name, layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old``, under every name that the model holds it by."""
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)


def _refuse_tied(model: nn.Module, name: str, layer: nn.Module) -> None:
    for other, module in model.named_modules():
        if module is not layer and any(p is layer.weight for p in module.parameters(recurse=False)):
            raise ValueError(
                f"sparsekd: layers {name!r} and {other!r} share one weight, which block-sparse layers cannot; "
                f"leave them dense with exclude=[{name!r}, {other!r}], or give each its own copy first"
            )


def _fits(layer: nn.Module, pattern: BlockPattern | None) -> bool:
    weight: Any = layer.weight
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    pattern = pattern or BlockPattern.for_device(weight.device, weight.dtype)
    if groups > 1 and (weight.shape[0] // groups) % pattern.bh:
        return False
    return not _on_gpu(layer) or cuda.takes(weight.shape, pattern, groups)


def _on_gpu(layer: nn.Module) -> bool:
    return layer.weight.is_cuda  # type: ignore[union-attr, return-value]


__all__ = ["DENSE_TYPES", "SPARSE_OF", "SPARSE_TYPES", "densify", "named_layers", "sparse_layer", "sparsify"]
