"""Operations that are no layers: which calls of torch they are, and what they become in a file."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..attention import self_attention
from ..norms import ScaleAndShift, scale_and_shift
from ..simplify import arguments_of
from ..sites import activation_of
from .graph import CannotExport, Shape
from .lowering import Lower, Lowering
from .shapes import MOVES, piece

aten = torch.ops.aten

_ONE = {
    **dict.fromkeys((nn.Tanh, torch.tanh, F.tanh, "tanh", "tanh_", aten.tanh.default), "tanh"),
    **dict.fromkeys((torch.exp, "exp", aten.exp.default), "exp"),
    **dict.fromkeys((torch.log, "log", aten.log.default), "log"),
    **dict.fromkeys((torch.log1p, "log1p", aten.log1p.default), "log1p"),
    **dict.fromkeys((torch.sign, "sign", aten.sign.default), "sign"),
    **dict.fromkeys((torch.sqrt, "sqrt", aten.sqrt.default), "sqrt"),
    **dict.fromkeys((torch.rsqrt, "rsqrt", aten.rsqrt.default), "rsqrt"),
    **dict.fromkeys((torch.abs, "abs", operator.abs, aten.abs.default), "abs"),
    **dict.fromkeys((torch.neg, "neg", operator.neg, aten.neg.default), "neg"),
    **dict.fromkeys((torch.square, "square", aten.square.default), "square"),
}
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_", aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar)
_SUBS = (operator.sub, operator.isub, torch.sub, "sub", "sub_", aten.sub.Tensor, aten.sub.Scalar)
_MULS = (operator.mul, operator.imul, torch.mul, "mul", "mul_", aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar)
_DIVS = (operator.truediv, operator.itruediv, torch.div, "div", "div_", aten.div.Tensor, aten.div.Scalar)
_TWO: dict[Any, str] = {
    **dict.fromkeys(_ADDS, "add"),
    **dict.fromkeys(_SUBS, "sub"),
    **dict.fromkeys(_MULS, "mul"),
    **dict.fromkeys(_DIVS, "div"),
    **dict.fromkeys((torch.maximum, "maximum", aten.maximum.default), "max"),
    **dict.fromkeys((operator.xor, torch.bitwise_xor, "bitwise_xor", aten.bitwise_xor.Tensor), "xor"),
    **dict.fromkeys((operator.rshift, torch.bitwise_right_shift, aten.__rshift__.Scalar), "shift_right"),
    **dict.fromkeys((operator.mod, torch.remainder, "remainder", aten.remainder.Scalar), "remainder"),
    **dict.fromkeys((torch.minimum, "minimum", aten.minimum.default), "min"),
}


def lower_of(node: fx.Node, module: nn.Module | None) -> Lower | None:
    """The function that lowers what a node calls, or None."""
    if module is None and node.op not in ("call_function", "call_method"):
        return None
    if activation_of(node, module) != "none":
        return lambda low, one, module: low.emit(activation_of(one, module), one, [low.value(one.args[0])])
    called: Any = node.target if module is None else type(module)
    if called in _ONE:
        return lambda low, one, _: low.emit(_ONE[called], one, [low.value(one.args[0])])
    if called in _TWO:
        return _two
    return _OTHERS.get(called) or MOVES.get(called)


def _two(low: Lowering, node: fx.Node, _: nn.Module | None) -> Any:
    if node not in low.shapes:
        return None  # sizes
    given = arguments_of(node, ("input", "other"))
    scale = given.get("alpha", 1)
    if scale != 1 or given.get("rounding_mode") is not None:
        raise CannotExport("is called with alpha or rounding_mode")
    dtype = low.dtypes[node]
    a, b = (_operand(low, given[name], dtype) for name in ("input", "other"))
    return low.graph.node(_TWO[node.target], node.name, [a, b], low.shapes[node], dtype)


def _operand(low: Lowering, given: Any, dtype: torch.dtype) -> int:
    value = low.value(given, dtype)
    if low.graph.dtype(value) != dtype:
        raise CannotExport(f"joins {low.graph.dtype(value)} and {dtype}; convert one of them first")
    return value


def _pow(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    known = {2: "square", 0.5: "sqrt", -0.5: "rsqrt"}
    given = arguments_of(node, ("input", "exponent"))
    if given["exponent"] not in known:
        raise CannotExport(f"takes the power {given['exponent']}; known are {', '.join(map(str, known))}")
    return low.emit(known[given["exponent"]], node, [low.value(given["input"])])


def _rsub(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "other"))
    dtype = low.dtypes[node]
    operands = [_operand(low, given[name], dtype) for name in ("other", "input")]
    return low.graph.node("sub", node.name, operands, low.shapes[node], dtype)


def _clamp(low: Lowering, node: fx.Node, module: nn.Module | None) -> int:
    low_end: Any
    high_end: Any
    if isinstance(module, nn.Hardtanh):
        low_end, high_end, x = module.min_val, module.max_val, node.args[0]
    else:
        given = arguments_of(node, ("input", "min", "max"))
        low_end, high_end, x = (given.get(one) for one in ("min", "max", "input"))
        low_end, high_end = given.get("min_val", low_end), given.get("max_val", high_end)
    value, dtype = low.value(x), low.dtypes[node]
    for op, end in (("max", low_end), ("min", high_end)):
        if end is not None:
            value = low.emit(op, node, [value, low.value(end, dtype)])
    return value


def _leaky(low: Lowering, node: fx.Node, module: nn.Module | None) -> int:
    slope = getattr(module, "negative_slope", None)
    slope = arguments_of(node, ("input", "negative_slope")).get("negative_slope", 0.01) if slope is None else slope
    if not 0 <= slope <= 1:
        raise CannotExport(f"has the negative slope {slope}, which is not from 0 to 1")
    x = low.value(node.args[0])
    below = low.emit("mul", node, [x, low.value(float(slope), low.dtypes[node])])
    return low.emit("max", node, [x, below])


# ---- Over axes


def _softmax(low: Lowering, node: fx.Node, module: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "dim"))
    dim: Any = given.get("dim") if module is None else module.dim
    if dim is None or given.get("dtype") not in (None, low.dtypes[node]):
        raise CannotExport("names no dim, or converts to another dtype")
    return low.emit("softmax", node, [low.value(given["input"])], axis=int(dim))


def _reduce(op: str) -> Lower:
    def lower(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
        given = arguments_of(node, ("input", "dim", "keepdim"))
        x = low.value(given["input"])
        dim = given.get("dim")
        if dim is None:
            raise CannotExport("reduces the whole batch to one number")
        axes = [dim] if isinstance(dim, int) else list(dim)
        return low.emit(op, node, [x], axes=axes, keepdim=bool(given.get("keepdim", False)))

    return lower


def _mean_of_images(low: Lowering, node: fx.Node, module: nn.Module | None) -> int:
    size = module.output_size if module is not None else arguments_of(node, ("input", "size"))["size"]
    if size not in (1, (1, 1), [1, 1]):
        raise CannotExport(f"pools to {size}; known is 1, and pooling by windows of one size")
    return low.emit("mean", node, [low.value(node.args[0])], axes=[-2, -1], keepdim=True)


def _layer_norm(low: Lowering, node: fx.Node, module: nn.Module | None) -> int:
    if isinstance(module, nn.LayerNorm):
        sizes, scale, shift, eps = module.normalized_shape, module.weight, module.bias, module.eps
        x = low.value(node.args[0])
        held: list[Any] = [None if one is None else low.graph.constant(f"{node.target}.{name}", one)
                for name, one in (("weight", scale), ("bias", shift))]  # fmt: skip
    else:
        given = arguments_of(node, ("input", "normalized_shape", "weight", "bias", "eps"))
        x, sizes, eps = low.value(given["input"]), given["normalized_shape"], given.get("eps", 1e-5)
        held = [None if given.get(name) is None else low.value(given[name]) for name in ("weight", "bias")]
    dtype = low.dtypes[node]
    if held != [None, None]:
        blank = (torch.ones, torch.zeros)
        held = [low.graph.constant("norm", blank[i](tuple(sizes), dtype=dtype)) if one is None else one
                for i, one in enumerate(held)]  # fmt: skip
    operands = [x, *(one for one in held if one is not None)]
    return low.emit("layer_norm", node, operands, axes=len(sizes), eps=float(eps))


def _scale_and_shift(low: Lowering, node: fx.Node, module: nn.Module | None) -> int:
    """A batch norm that no layer takes in."""
    assert module is not None
    if module.running_mean is None:
        raise CannotExport("normalises by the statistics of its batch")
    x = low.value(node.args[0])
    dtype = low.dtypes[node]
    sides = (-1, *(1 for _ in low.shapes[node][2:]))
    for op, tensor in zip(("mul", "add"), scale_and_shift(module), strict=True):
        held = low.graph.constant(f"{node.target}.{op}", tensor.to(dtype).reshape(sides))
        x = low.emit(op, node, [x, held])
    return x


def _top_k(low: Lowering, node: fx.Node, _: nn.Module | None) -> tuple[int, ...]:
    given = arguments_of(node, ("input", "k", "dim", "largest", "sorted"))
    x = low.value(given["input"])
    shape = low.graph.shape(x)
    if given.get("dim", -1) not in (-1, len(shape) - 1) or not given.get("largest", True):
        raise CannotExport("looks along another axis than the last, or for the smallest")
    made = (*shape[:-1], int(given["k"]))
    return _largest(low, node, x, made, int(given["k"]))


def _largest(low: Lowering, node: fx.Node, x: int, shape: Shape, k: int) -> tuple[int, int]:
    values, places = low.graph.value(shape, low.graph.dtype(x)), low.graph.value(shape, torch.int64)
    low.graph.add("top_k", node.name, [x], [values, places], k=k)
    return values, places


def _argmax(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "dim", "keepdim"))
    x = low.value(given["input"])
    shape = low.graph.shape(x)
    if given.get("dim") not in (-1, len(shape) - 1):
        raise CannotExport("looks along another axis than the last")
    places = _largest(low, node, x, (*shape[:-1], 1), 1)[1]
    return low.graph.node("reshape", node.name, [places], low.shapes[node], torch.int64)


# ---- Products


def _matmul(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    a, b = (low.value(one) for one in node.args[:2])
    return product(low, node, a, b, low.shapes[node], transposed=False)


def product(low: Lowering, node: fx.Node, a: int, b: int, shape: Shape, transposed: bool) -> int:
    dtype = low.graph.dtype(a)
    if len(low.graph.shape(a)) < 2 or len(low.graph.shape(b)) < 2:
        raise CannotExport("multiplies a vector; make it a matrix")
    a, b = (low.cast(node, one, torch.float32) for one in (a, b))
    y = low.graph.node("matmul", node.name, [a, b], shape, torch.float32, transposed=transposed)
    return low.cast(node, y, dtype)


def _linear(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    """With a weight that is no layer's."""
    given = arguments_of(node, ("input", "weight", "bias"))
    y = product(low, node, low.value(given["input"]), low.value(given["weight"]), low.shapes[node], transposed=True)
    return y if given.get("bias") is None else low.emit("add", node, [y, low.value(given["bias"])])


def _addmm(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    bias, a, b = (low.value(one) for one in node.args[:3])
    return low.emit("add", node, [product(low, node, a, b, low.shapes[node], transposed=False), bias])


def _attention(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    given = arguments_of(node, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"))
    query, key, value = (low.value(given[name]) for name in ("query", "key", "value"))
    if given.get("dropout_p", 0.0):
        raise CannotExport("drops at random")
    scale = given.get("scale")
    factor = low.graph.shape(query)[-1] ** -0.5 if scale is None else float(scale)
    return attend(low, node, (query, key, value), given.get("attn_mask"), bool(given.get("is_causal")), factor)


def attend(low: Lowering, node: fx.Node, operands: tuple[int, int, int], mask: Any, causal: bool, scale: float) -> int:
    """softmax(q k^T scale + mask) v."""
    query, key, value = operands
    *outer, length, _ = low.graph.shape(query)
    dtype, seen = low.graph.dtype(query), low.graph.shape(key)[-2]
    query = low.emit("mul", node, [query, low.value(scale, dtype)], low.graph.shape(query))
    scored = (*outer, length, seen)
    scores = product(low, node, query, key, scored, transposed=True)
    if mask is not None or causal:
        hidden = torch.ones(length, seen, dtype=torch.bool).triu(1)
        never = torch.zeros(length, seen, dtype=dtype).masked_fill_(hidden, float("-inf"))
        held = low.value(mask) if mask is not None else low.graph.constant(f"{node.name}.mask", never)
        if low.graph.dtype(held) != dtype:
            raise CannotExport("has a mask of truth values; give it as numbers, minus infinity where nothing is seen")
        scores = low.emit("add", node, [scores, held], scored)
    weights = low.emit("softmax", node, [scores], scored, axis=-1)
    made = (*outer, length, low.graph.shape(value)[-1])
    return product(low, node, weights, value, made, transposed=False)


def _self_attention(low: Lowering, node: fx.Node, _: nn.Module | None) -> int:
    """`attention.self_attention`: queries, keys and values side by side, [B, T, 3 E] or, time first, [T, B, 3 E]."""
    given = arguments_of(node, ("projected", "heads", "mask", "causal", "time_first"))
    x, heads, time_first = low.value(given["projected"]), int(given["heads"]), bool(given["time_first"])
    first, second, wide = low.graph.shape(x)
    width = wide // 3 // heads
    x = low.emit("reshape", node, [x], (first, second, 3, heads, width))
    batch, length = (second, first) if time_first else (first, second)
    order = [2, 1, 3, 0, 4] if time_first else [2, 0, 3, 1, 4]
    x = low.emit("permute", node, [x], (3, batch, heads, length, width), order=order)
    parts = [piece(low, node, x, 0, i, i + 1) for i in range(3)]
    shape = (batch, heads, length, width)
    query, key, value = (low.emit("reshape", node, [part], shape) for part in parts)
    mixed = attend(low, node, (query, key, value), given.get("mask"), bool(given["causal"]), width**-0.5)
    back = [2, 0, 1, 3] if time_first else [0, 2, 1, 3]
    shape = (length, batch, heads, width) if time_first else (batch, length, heads, width)
    return low.emit("reshape", node, [low.emit("permute", node, [mixed], shape, order=back)])


# ---- Tables


def _embedding(low: Lowering, node: fx.Node, module: nn.Module | None) -> int:
    if module is not None:
        return _looked_up(low, node, low.value(node.args[0]), _table_of(low, str(node.target), module))
    names = ("weight", "indices") if node.target is aten.embedding.default else ("input", "weight")
    given = arguments_of(node, names)
    table = low.value(given["weight"])
    named = low.graph.values[table].get("tensor")
    if named is None:
        raise CannotExport("looks up in a table that is computed")
    return _looked_up(low, node, low.value(given.get("indices", given.get("input"))), {"table": named})


def _table_of(low: Lowering, name: str, module: Any) -> dict[str, Any]:
    if getattr(module, "max_norm", None) is not None:
        raise CannotExport("changes its table when it is read (max_norm)")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"table": low.graph.tensor(f"{name}.weight", module.weight)}
    values: Tensor = module.values
    if values.dtype != torch.float32:
        raise CannotExport(f"has a sparse table of {values.dtype}; known is float32")
    named = {"table": low.graph.tensor(f"{name}.values", values), "kept": low.graph.tensor(f"{name}.kept", module.kept)}
    return {**named, "dim": module.embedding_dim}


def _looked_up(low: Lowering, node: fx.Node, ids: int, table: dict[str, Any]) -> int:
    return low.graph.node("embedding", node.name, [ids], low.shapes[node], low.dtypes[node], **table)


def _bag(low: Lowering, node: fx.Node, module: nn.Module | None) -> int:
    given = arguments_of(node, ("input", "offsets", "per_sample_weights"))
    ids = low.value(given["input"])
    if (
        len(low.graph.shape(ids)) != 2
        or given.get("offsets") is not None
        or given.get("per_sample_weights") is not None
    ):
        raise CannotExport("takes offsets or weights; a file holds bags of one length, ids [bags, length]")
    assert module is not None
    padding = -1 if module.padding_idx is None else module.padding_idx
    table = _table_of(low, str(node.target), module)
    dense = low.graph.tensors[table["table"]]
    low.graph.tensors[table["table"]] = dense.float()  # bags are summed in float32, also of bfloat16
    bags = low.graph.node(
        "embedding_bag",
        node.name,
        [ids],
        low.shapes[node],
        torch.float32,
        mode=module.mode,
        padding=padding,
        **table,
    )
    return low.cast(node, bags, low.dtypes[node])


def _sparse_tables() -> dict[Any, Lower]:
    from ...nn import SparseEmbedding, SparseEmbeddingBag

    return {SparseEmbedding: _embedding, SparseEmbeddingBag: _bag}


_OTHERS: dict[Any, Lower] = {
    **dict.fromkeys((torch.pow, operator.pow, "pow", aten.pow.Tensor_Scalar), _pow),
    **dict.fromkeys((torch.rsub, aten.rsub.Scalar, aten.rsub.Tensor), _rsub),
    **dict.fromkeys((torch.clamp, torch.clip, "clamp", "clamp_", F.hardtanh, nn.Hardtanh, aten.clamp.default), _clamp),
    **dict.fromkeys((aten.hardtanh.default, F.relu6), _clamp),
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu, aten.leaky_relu.default), _leaky),
    **dict.fromkeys(
        (nn.Softmax, F.softmax, torch.softmax, "softmax", aten.softmax.int, aten._softmax.default), _softmax
    ),
    **dict.fromkeys((torch.mean, "mean", aten.mean.dim), _reduce("mean")),
    **dict.fromkeys((torch.sum, "sum", aten.sum.dim_IntList), _reduce("sum")),
    **dict.fromkeys((torch.amax, "amax", aten.amax.default), _reduce("amax")),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default), _mean_of_images),
    **dict.fromkeys((nn.LayerNorm, F.layer_norm, aten.layer_norm.default), _layer_norm),
    **dict.fromkeys((ScaleAndShift, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _scale_and_shift),
    **dict.fromkeys((torch.topk, "topk", aten.topk.default), _top_k),
    **dict.fromkeys((torch.argmax, "argmax", aten.argmax.default), _argmax),
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm", "mm", torch.mm), _matmul),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _matmul),
    **dict.fromkeys((F.linear, aten.linear.default), _linear),
    **dict.fromkeys((torch.addmm, aten.addmm.default), _addmm),
    **dict.fromkeys((F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default), _attention),
    self_attention: _self_attention,
    **dict.fromkeys((nn.Embedding, F.embedding, aten.embedding.default), _embedding),
    nn.EmbeddingBag: _bag,
    **_sparse_tables(),
}


__all__ = ["lower_of"]
