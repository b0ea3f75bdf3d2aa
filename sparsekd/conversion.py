"""Which layers of a model can be block-sparse, which are meant, and why others stay dense. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .backends import cuda
from .blocks import BlockPattern
from .nn import (
    BlockSparseLayer,
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose2d,
    SparseLinear,
)
from .nn.attention import reads_weights
from .nn.embedding import SparseEmbedding, SparseEmbeddingBag
from .nn.embedding_table import SparseTable
from .nn.layer import computes_as

# The block-sparse layer that stands for each dense one. A layer that comes to the library is entered here.
SPARSE_OF: dict[type[nn.Module], type[BlockSparseLayer]] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.Conv3d: SparseConv3d,
    nn.ConvTranspose2d: SparseConvTranspose2d,
}
DENSE_TYPES, SPARSE_TYPES = tuple(SPARSE_OF), tuple(SPARSE_OF.values())

# Tables, whose entries go one by one: only where `include` names them, since a model that loses most of its embeddings
# unasked would surprise.
TABLE_OF: dict[type[nn.Module], type[SparseTable]] = {
    nn.Embedding: SparseEmbedding,
    nn.EmbeddingBag: SparseEmbeddingBag,
}

Pattern = BlockPattern | Callable[[Any], BlockPattern] | None


@dataclass(frozen=True)
class ConversionReport:
    """What ``sparsify`` makes of a model: three dictionaries by module name.

    Attributes:
        sparse: layers that are block-sparse now, as they print themselves.
        convertible: layers that ``sparsify`` would convert.
        dense: layers with a weight that stay dense, and why.
        unexpected: those of ``dense`` that neither the caller left out nor sparsity would make slower.
    """

    sparse: dict[str, str]
    convertible: dict[str, str]
    dense: dict[str, str]
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = (("block-sparse", self.sparse), ("can be converted", self.convertible), ("dense", self.dense))
        counts = ", ".join(f"{len(layers)} {what}" for what, layers in parts if layers or what == "block-sparse")
        width = max((len(name) for _, layers in parts for name in layers), default=0)
        lines = [
            f"  {what:<16}  {name or '(the model)':<{width}}  {text}"
            for what, layers in parts
            for name, text in layers.items()
        ]
        return "\n".join([f"layers: {counts}", *lines])


@dataclass(frozen=True)
class Found:
    """A module that holds a weight: ``kind`` is its block-sparse type if it is to be converted, else ``why`` not."""

    name: str
    layer: Any
    kind: type[BlockSparseLayer] | type[SparseTable] | None = None
    why: str = ""
    unexpected: bool = False  # stays dense although nobody asked for it


def survey(
    model: nn.Module, pattern: Pattern, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[Found]:
    """Every module with a weight, and what ``sparsify`` does with it.

    Raises ValueError for a pattern that names nothing, and for a layer that ``include`` names but cannot be converted.
    """
    not_excluded = {name for name, _ in named_layers(model, (nn.Module,), None, exclude, alike=False)}
    types = (*DENSE_TYPES, *SPARSE_TYPES, *TABLE_OF, *TABLE_OF.values())
    chosen = {name for name, _ in named_layers(model, types, include, exclude, alike=False)}
    shared = _shared_parameters(model)
    surveyed = []
    for name, layer in model.named_modules():
        if isinstance(layer, (BlockSparseLayer, SparseTable)):
            surveyed.append(Found(name, layer))
        elif (table := table_type(layer)) is not None:
            surveyed.append(_table(name, layer, table, shared, include is not None and name in chosen))
        elif (kind := sparse_type(layer)) is None:
            if reason := _no_block_sparse_form(layer):
                why, unexpected = reason
                surveyed.append(Found(name, layer, None, why, unexpected and name in not_excluded))
        elif name not in chosen:
            surveyed.append(Found(name, layer, None, "left out by exclude or not named by include"))
        elif name in (include or ()) or not (why := _stays_dense(model, name, layer, kind)):
            surveyed.append(_fitting(name, layer, kind, pattern, shared, include is not None))
        else:
            surveyed.append(Found(name, layer, None, why, unexpected=True))
    return surveyed


def report(surveyed: Sequence[Found]) -> ConversionReport:
    sparse = {
        each.name: repr(each.layer) for each in surveyed if isinstance(each.layer, (BlockSparseLayer, SparseTable))
    }
    convertible = {each.name: repr(each.layer) for each in surveyed if each.kind}
    dense = {each.name: each.why for each in surveyed if each.why}
    return ConversionReport(sparse, convertible, dense, tuple(each.name for each in surveyed if each.unexpected))


def sparse_type(layer: nn.Module) -> type[BlockSparseLayer] | None:
    """The block-sparse type that stands for a layer of this type, or of a subclass of it."""
    return next((sparse for dense, sparse in SPARSE_OF.items() if isinstance(layer, dense)), None)


def table_type(layer: nn.Module) -> type[SparseTable] | None:
    """The packed table that stands for a layer of this type, or of a subclass of it."""
    return next((sparse for dense, sparse in TABLE_OF.items() if isinstance(layer, dense)), None)


def named_layers(
    model: nn.Module,
    types: tuple[type, ...],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    alike: bool = True,
) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the layers of these types that ``include`` names and ``exclude`` does not.

    A subclass counts if it inherits the whole forward pass (with ``alike=False`` any does). A pattern that is the very
    name of a module names that module alone, whatever brackets and stars are in it; a layer under several names goes by
    all of them and is given under the first.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}; make one of it" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"sparsekd: expected a model, a torch.nn.Module, got {what}")
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise TypeError(f"sparsekd: {option} must be several names, got the text {patterns!r}; pass [{patterns!r}]")
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    layers = {
        name: module
        for name, module in model.named_modules()
        if (any(computes_as(module, kind) for kind in types) if alike else isinstance(module, types))
    }
    every = {name for aliases in names.values() for name in aliases}
    for wanted in include or ():
        if not any(_names(wanted, name, every) for module in layers.values() for name in names[id(module)]):
            raise ValueError(
                f"sparsekd: include pattern {wanted!r} names no layer of a type that can be block-sparse; "
                f"the model has {', '.join(layers) or 'none'}"
            )
    for unwanted in exclude or ():
        if not any(_names(unwanted, name, every) for name in every):
            raise ValueError(f"sparsekd: exclude pattern {unwanted!r} names no module of the model")
    for name, layer in layers.items():
        aliases = names[id(layer)]
        included = include is None or any(_names(wanted, alias, every) for wanted in include for alias in aliases)
        if included and not any(_names(unwanted, alias, every) for unwanted in exclude or () for alias in aliases):
            yield name, layer


def _names(pattern: str, name: str, every: set[str]) -> bool:
    return name == pattern if pattern in every else fnmatchcase(name, pattern)


def _shared_parameters(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Of every parameter: the modules that hold it."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((name, module))
    return holders


def _stays_dense(model: nn.Module, name: str, layer: nn.Module, kind: type[BlockSparseLayer]) -> str:
    """Why a layer of a type that has a block-sparse form has none itself, or ""."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if reads_weights(parent) and name.endswith("out_proj"):
        return f"{type(parent).__name__} reads its weight in a forward of its own"
    return kind.refusal(layer) or _bound_hooks(layer)


def _bound_hooks(layer: nn.Module) -> str:
    hooks = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    return "its state_dict has hooks that know its weight" if any(getattr(layer, name) for name in hooks) else ""


def _fitting(
    name: str,
    layer: Any,
    kind: type[BlockSparseLayer],
    pattern: Pattern,
    shared: dict[int, list[tuple[str, nn.Module]]],
    named: bool,
) -> Found:
    """A layer that is wanted: to be converted, or dense for a reason. Raises if it was ``named`` and cannot be."""
    if named and (refusal := kind.refusal(layer)):
        raise TypeError(f"sparsekd.sparsify: layer {name!r}: expected nn.{kind.dense_type.__name__}, got {refusal}")
    for other, module in (holder for parameter in layer.parameters() for holder in shared[id(parameter)]):
        if module is not layer:
            if named:
                raise _sharing(name, other)
            return Found(name, layer, None, f"shares a weight with {other or 'the model itself'}", unexpected=True)
    weight = layer.weight
    if weight.is_meta:
        raise ValueError(f"sparsekd.sparsify: layer {name!r} is on the meta device and has no values; load it first")
    blocks = pattern(layer) if callable(pattern) else pattern
    blocks = blocks or BlockPattern.for_device(weight.device, weight.dtype)
    if misfit := kind.misfit(layer, blocks):
        if named:
            raise ValueError(f"sparsekd.sparsify: layer {name!r}: {misfit}")
        narrow = getattr(layer, "groups", 1) > 1
        return Found(name, layer, None, misfit, unexpected=not narrow)
    matrix, groups = kind.matrix_shape_of(weight.shape), getattr(layer, "groups", 1)
    if not named and on_gpu(layer) and not cuda.takes(matrix, blocks, groups):
        return Found(name, layer, None, f"the GPU kernels do not take its channels in blocks of {blocks}")
    return Found(name, layer, kind)


def _table(
    name: str, layer: Any, kind: type[SparseTable], shared: dict[int, list[tuple[str, nn.Module]]], named: bool
) -> Found:
    """An embedding: to be converted where it is named, else dense. Raises if it was ``named`` and cannot be."""
    dense = kind.dense_type.__name__
    if not named:
        return Found(name, layer, None, f"{dense} looks rows up; name it in include to keep single entries of them")
    if refusal := kind.refusal(layer):
        raise TypeError(f"sparsekd.sparsify: layer {name!r}: expected nn.{dense}, got {refusal}")
    for other, module in shared[id(layer.weight)]:
        if module is not layer:
            raise _sharing(name, other)
    return Found(name, layer, kind)


def _sharing(name: str, other: str) -> ValueError:
    return ValueError(
        f"sparsekd: layers {name!r} and {other!r} share one weight, which block-sparse layers cannot; "
        f"leave them dense with exclude=[{name!r}, {other!r}], or give each its own copy first"
    )


def _no_block_sparse_form(module: nn.Module) -> tuple[str, bool] | None:
    """(why, unexpected) for a module that holds a matrix of its own; None for one that does not."""
    if isinstance(module, parametrize.ParametrizationList):
        return None  # named with the layer whose weight it computes
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
    if not own:
        return None
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return f"scripted ({module.original_name}): sparsify before torch.jit.script", True
    if isinstance(module, nn.MultiheadAttention):
        return "its input projections are one Parameter of the attention itself", True
    if type(module).__module__.startswith("torch.nn"):
        return f"{kind} has no block-sparse form", True
    return f"{kind} computes with Parameters of its own: {', '.join(own)}", False


def on_gpu(layer: nn.Module) -> bool:
    return layer.weight.is_cuda  # type: ignore[union-attr, return-value]
