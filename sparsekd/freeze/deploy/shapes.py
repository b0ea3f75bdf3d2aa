"""Operations that move numbers: reshapes, permutations, pieces, joins, conversions."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..simplify import arguments_of
from .graph import CannotExport
from .lowering import Lower, Lowering

aten = torch.ops.aten


def _reshape(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    """Whatever leaves the numbers in their row-major order; the trace says what shape comes out."""
    x = low.value(node.args[0])
    return x if low.graph.shape(x) == low.shapes[node] else low.emit("reshape", node, [x])


def _same(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    return low.value(node.args[0])


def _permute(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "dims"))
    dims = given["dims"] if isinstance(given["dims"], (tuple, list)) else node.args[1:]
    return _permuted(low, node, low.value(given["input"]), list(dims))


def _transpose(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "dim0", "dim1"))
    x = low.value(given["input"])
    order: list[Any] = list(range(len(low.graph.shape(x))))
    first, second = given.get("dim0", 0), given.get("dim1", 1)
    order[first], order[second] = order[second], order[first]
    return _permuted(low, node, x, order)


def _permuted(low: Lowering, node: fx.Node, x: int, dims: list[Any]) -> int:
    rank = len(low.graph.shape(x))
    return low.emit("permute", node, [x], order=[dim % rank for dim in dims])


def _turned(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    """`x.T`, `x.mT`, `x.t()`."""
    x = low.value(node.args[0])
    order = list(range(len(low.graph.shape(x))))
    order[-2:] = order[:-3:-1]
    return _permuted(low, node, x, order)


def _attribute(low: Lowering, node: fx.Node, module: nn.Module | None) -> Any:
    if node not in low.shapes:
        return None  # a size
    if node.args[1] in ("T", "mT"):
        return _turned(low, node, module)
    raise CannotExport(f"reads .{node.args[1]}")


def _concat(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("tensors", "dim"))
    parts = [low.value(one) for one in given["tensors"]]
    return low.emit("concat", node, parts, axis=int(given.get("dim", given.get("axis", 0))))


def _stack(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("tensors", "dim"))
    axis = int(given.get("dim", 0)) % len(low.shapes[node])
    parts = []
    for one in given["tensors"]:
        x = low.value(one)
        shape = list(low.graph.shape(x))
        shape.insert(axis, 1)
        parts.append(low.emit("reshape", node, [x], tuple(shape)))
    return low.emit("concat", node, parts, axis=axis)


def piece(low: Lowering, node: fx.Node, x: int, axis: int, start: int, stop: int, step: int = 1) -> int:
    """Elements start, start + step, ... before stop."""
    shape = list(low.graph.shape(x))
    axis %= len(shape)
    if shape[axis] >= 0 and (start, stop, step) == (0, shape[axis], 1):
        return x
    if shape[axis] < 0:
        raise CannotExport("picks samples of the batch")
    shape[axis] = max(0, -(-(stop - start) // step))
    return low.emit("slice", node, [x], tuple(shape), axis=axis, start=start, stop=max(start, stop), step=step)


def _split(low: Lowering, node: fx.Node, _: nn.Module | None) -> tuple[int, ...]:
    names = ("input", "sizes", "dim")
    given = arguments_of(node, names)
    sizes: Any = given.get("sizes", given.get("split_size_or_sections", given.get("split_size", given.get("chunks"))))
    x = low.value(given["input"])
    axis = int(given.get("dim", 0)) % len(low.graph.shape(x))
    length = low.graph.shape(x)[axis]
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if length < 0:
        raise CannotExport("splits the batch")
    if "chunk" in called:
        sizes = -(-length // sizes)
    if isinstance(sizes, int):
        sizes = [min(sizes, length - i) for i in range(0, length, sizes)]
    made, start = [], 0
    for size in sizes:
        made.append(piece(low, node, x, axis, start, start + size))
        start += size
    return tuple(made)


def _unbind(low: Lowering, node: fx.Node, _: nn.Module | None) -> tuple[int, ...]:
    given = arguments_of(node, ("input", "dim"))
    x = low.value(given["input"])
    axis = int(given.get("dim", 0)) % len(low.graph.shape(x))
    return tuple(_one(low, node, x, axis, i) for i in range(low.graph.shape(x)[axis]))


def _one(low: Lowering, node: fx.Node, x: int, axis: int, place: int) -> int:
    """Of an axis, which goes."""
    shape = low.graph.shape(x)
    place %= max(shape[axis], 1)
    part = piece(low, node, x, axis, place, place + 1)
    return low.emit("reshape", node, [part], (*shape[:axis], *shape[axis + 1 :]))


def _select(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "dim", "index"))
    x = low.value(given["input"])
    return _one(low, node, x, int(given["dim"]) % len(low.graph.shape(x)), int(given["index"]))


def _slice(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "dim", "start", "end", "step"))
    x = low.value(given["input"])
    axis = int(given.get("dim", 0)) % len(low.graph.shape(x))
    return _cut(low, node, x, axis, slice(given.get("start"), given.get("end"), given.get("step")))


def _cut(low: Lowering, node: fx.Node, x: int, axis: int, part: slice) -> int:
    if any(isinstance(one, fx.Node) for one in (part.start, part.stop, part.step)):
        raise CannotExport("cuts at places that follow from sizes")
    length = low.graph.shape(x)[axis]
    if length < 0:
        if part.start in (None, 0) and part.stop in (None, 2**63 - 1) and part.step in (None, 1):
            return x
        raise CannotExport("picks samples of the batch")
    start, stop, step = part.indices(length)
    if step < 1:
        raise CannotExport("runs backwards")
    return piece(low, node, x, axis, start, max(start, stop), step)


def _narrow(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "dim", "start", "length"))
    return piece(low, node, low.value(given["input"]), given["dim"], given["start"], given["start"] + given["length"])


def _item(low: Lowering, node: fx.Node, module: nn.Module | None) -> Any:
    """`x[...]` of a tensor, or one of several results."""
    source, index = node.args
    made = low.known.get(source)  # type: ignore[arg-type]
    if isinstance(made, tuple):
        return made[index]  # type: ignore[index]
    if made is None:
        return None  # of sizes
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(one, (fx.Node, Tensor)) for one in parts):
        return _at_places(low, node, made, parts)
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        rank = len(low.graph.shape(made)) - sum(one is not None and one is not Ellipsis for one in parts)
        parts[place : place + 1] = [slice(None)] * rank
    axis, x = 0, made
    for part in parts:
        if part is None:
            shape = list(low.graph.shape(x))
            shape.insert(axis, 1)
            x = low.emit("reshape", node, [x], tuple(shape))
        elif isinstance(part, slice):
            x = _cut(low, node, x, axis, part)
        elif type(part) is int:
            x, axis = _one(low, node, x, axis, part), axis - 1
        else:
            raise CannotExport(f"is indexed by {part!r}")
        axis += 1
    return x


def _index(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    """aten.index: None where an axis stays."""
    given: Any = node.args[1]
    return _at_places(low, node, low.value(node.args[0]), [slice(None) if one is None else one for one in given])


def _at_places(low: Lowering, node: fx.Node, x: int, parts: list[Any]) -> int:
    """``x[:, i]`` and ``x[:, i, j]`` with constant lists of places."""
    whole = [one == slice(None) if isinstance(one, slice) else False for one in parts]
    first = whole.index(False)
    lists = [_constant(low, one) for one in parts[first:] if not (isinstance(one, slice) and one == slice(None))]
    if any(whole[first : first + len(lists)]) or any(one.dim() != 1 for one in lists) or len(lists) > 2:
        raise CannotExport("picks by places that are computed, or no lists along one or two neighbouring axes")
    shape = low.graph.shape(x)
    sizes = shape[first : first + len(lists)]
    places = lists[0] % sizes[0]
    if len(lists) == 2:
        places = places * sizes[1] + lists[1] % sizes[1]
        shape = (*shape[:first], sizes[0] * sizes[1], *shape[first + 2 :])
        x = low.emit("reshape", node, [x], shape)
    held = low.graph.constant(f"{node.name}.places", places.long())
    return low.emit("take", node, [x, held], axis=first)


def _constant(low: Lowering, one: Any) -> Tensor:
    tensor = one
    if isinstance(one, fx.Node):
        made = low.known.get(one)
        named = low.graph.values[made].get("tensor") if isinstance(made, int) else None
        tensor = None if named is None else low.graph.tensors[named]
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int64, torch.int32):
        raise CannotExport("picks by places that are computed")
    return tensor


def _index_select(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "dim", "index"))
    x = low.value(given["input"])
    held = low.graph.constant(f"{node.name}.places", _constant(low, given["index"]).long())
    return low.emit("take", node, [x, held], axis=int(given["dim"]))


def _expand(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    x = low.value(node.args[0])
    return x if low.graph.shape(x) == low.shapes[node] else low.emit("expand", node, [x])


def _cast(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    return low.cast(node, low.value(node.args[0]), low.dtypes[node])


def _pad(low: Lowering, node: fx.Node, module: nn.Module | None) -> int:
    if module is not None:
        given: dict[str, Any] = {"pad": module.padding, "value": getattr(module, "value", 0)}
    else:
        given = arguments_of(node, ("input", "pad", "mode", "value"))
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
        raise CannotExport("pads with something else than zeros")
    x = low.value(node.args[0])
    rank = len(low.graph.shape(x))
    before, after = [0] * rank, [0] * rank
    for i, (low_end, high_end) in enumerate(zip(given["pad"][::2], given["pad"][1::2], strict=True)):
        before[rank - 1 - i], after[rank - 1 - i] = low_end, high_end
    if min(*before, *after) < 0:
        raise CannotExport("pads by less than nothing")
    return low.emit("pad", node, [x], before=before, after=after)


_RESHAPES = (
    *(nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten),
    *("flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as"),
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten._unsafe_view.default, aten.squeeze.dims, aten.squeeze.default, aten.unflatten.int),
)
_NOTHING = ("contiguous", aten.contiguous.default, "clone", torch.clone, aten.clone.default, "detach")
_CASTS = ("float", "long", "int", "to", "type", "bfloat16", aten.to.dtype, aten._to_copy.default, "type_as")

MOVES: dict[Any, Lower] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_NOTHING, _same),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys((torch.permute, "permute", aten.permute.default), _permute),
    **dict.fromkeys((torch.transpose, "transpose", torch.swapaxes, aten.transpose.int, "swapaxes"), _transpose),
    **dict.fromkeys((torch.t, "t", aten.t.default), _turned),
    getattr: _attribute,
    **dict.fromkeys((torch.cat, torch.concat, aten.cat.default), _concat),
    **dict.fromkeys((torch.stack, aten.stack.default), _stack),
    **dict.fromkeys((torch.split, torch.chunk, "split", "chunk", aten.split.Tensor, aten.chunk.default), _split),
    aten.split_with_sizes.default: _split,
    **dict.fromkeys((torch.unbind, "unbind", aten.unbind.int), _unbind),
    **dict.fromkeys((torch.select, "select", aten.select.int), _select),
    aten.slice.Tensor: _slice,
    **dict.fromkeys((torch.narrow, "narrow", aten.narrow.default), _narrow),
    operator.getitem: _item,
    aten.index.Tensor: _index,
    **dict.fromkeys((torch.index_select, "index_select", aten.index_select.default), _index_select),
    **dict.fromkeys(("expand", aten.expand.default, "expand_as"), _expand),
    **dict.fromkeys((F.pad, aten.pad.default, aten.constant_pad_nd.default, nn.ZeroPad2d), _pad),
}


__all__ = ["MOVES", "piece"]
