"""Frozen layers as nodes of a file: what `sparsekd._C` runs, whatever was chosen inside torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...blocks import BlockPattern, BlockSparse
from ..layer import FrozenLayer
from ..plan import Geometry
from ..quantize import quantize_weight
from .graph import CannotExport, Graph

_POOLS = {"max": "max_pool", "mean": "mean_pool"}


def add_layer(graph: Graph, name: str, layer: FrozenLayer, inputs: list[int]) -> int:
    """The value that a layer makes of ``inputs``: x and, where it has one, a residual."""
    geometry = layer.geometry
    if geometry.between:
        return _between(graph, name, layer, inputs)
    x, *rest = inputs
    if geometry.pad is not None:
        x = _padded(graph, name, x, geometry)
    if geometry.kind in _POOLS:
        return _pooled(graph, name, x, geometry)
    if geometry.kind not in ("conv2d", "linear", "norm"):
        raise CannotExport(f"is a layer of the kind {geometry.kind!r}, which the run time does not know yet")
    tensors = layer.tensors()
    if geometry.depthwise and "weight" in tensors:
        return _depthwise(graph, name, [x, *rest], geometry, tensors)
    attributes = _weights(graph, name, layer, tensors)
    attributes |= {"activation": geometry.activation, "outputs": geometry.weight[0]}
    shape = (*graph.shape(x)[:-1], geometry.weight[0])
    if geometry.kind == "conv2d":
        attributes |= {"kernel": list(geometry.weight[2:]), "groups": geometry.groups, **_walk(geometry)}
        shape = (graph.shape(x)[0], *_maps(graph, x, geometry))
    y = graph.node(geometry.kind, name, [x, *rest], shape, graph.dtype(x), **attributes)
    return _flattened(graph, name, y, geometry)


def _between(graph: Graph, name: str, layer: FrozenLayer, inputs: list[int]) -> int:
    """What stands between layers: a product with a gate, channels side by side, a layer norm."""
    geometry, x = layer.geometry, inputs[0]
    shape, dtype = graph.shape(x), graph.dtype(x)
    if geometry.kind == "gate":
        return graph.node("gate", name, inputs, shape, dtype, activation=geometry.activation)
    if geometry.kind == "cat":
        joined = (shape[0], geometry.out_channels, *shape[2:])
        return graph.node("concat", name, inputs, joined, dtype, axis=1)
    tensors = layer.tensors()
    weight: Tensor = tensors["weight"]
    bias = torch.zeros_like(weight) if tensors.get("bias") is None else tensors["bias"]
    held = [graph.constant(f"{name}.{one}", tensor) for one, tensor in (("weight", weight), ("bias", bias))]
    return graph.node("layer_norm", name, [x, *held], shape, dtype, axes=1, eps=geometry.epsilon)


def _walk(geometry: Geometry) -> dict[str, list[int]]:
    return {one: list(getattr(geometry, one)) for one in ("stride", "padding", "dilation")}


def _maps(graph: Graph, x: int, geometry: Geometry) -> tuple[int, ...]:
    """(K, P, Q) of the maps that a layer makes."""
    return geometry.weight[0], *geometry.walk.output_size(graph.shape(x)[2:])


def _flattened(graph: Graph, name: str, y: int, geometry: Geometry) -> int:
    if not geometry.flat:
        return y
    return graph.node("reshape", f"{name}.flatten", [y], graph.shape(y)[:2], graph.dtype(y))


def _weights(graph: Graph, name: str, layer: FrozenLayer, tensors: dict[str, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    if tensors.get("bias") is not None:
        attributes["bias"] = graph.tensor(f"{name}.bias", tensors["bias"].float())
    if "weight" in tensors:
        return {**attributes, "weight": graph.tensor(f"{name}.weight", tensors["weight"])}
    assert layer.pattern is not None
    index: tuple[Tensor, Tensor] = tensors["row_ptr"], tensors["col_idx"]
    values: Tensor = tensors["values"]
    if layer.bytes is not None:
        pattern: BlockPattern = layer.pattern
        values, scale = quantize_weight(BlockSparse(values, *index, layer.geometry.weight, pattern))
        attributes |= {"scale": graph.tensor(f"{name}.scale", scale)}
        attributes |= {"x_scale": layer.bytes[0], "x_zero": layer.bytes[1]}
    attributes["weight"] = graph.tensor(f"{name}.values", values)
    attributes["row_ptr"] = graph.tensor(f"{name}.row_ptr", index[0].int())
    attributes["col_idx"] = graph.tensor(f"{name}.col_idx", index[1].int())
    return {**attributes, "block": [layer.pattern.bh, layer.pattern.bw]}


def _depthwise(graph: Graph, name: str, inputs: list[int], geometry: Geometry, tensors: dict[str, Any]) -> int:
    """In float32 also where the network computes in bfloat16. A norm is the 1 x 1 case."""
    dtype = graph.dtype(inputs[0])
    if dtype != torch.float32:
        inputs = [_cast(graph, name, one, torch.float32) for one in inputs]
    kernel = geometry.weight[2:] if geometry.kind == "conv2d" else (1, 1)
    weight: Tensor = tensors["weight"].float().reshape(geometry.weight[0], 1, *kernel)
    attributes: dict[str, Any] = {"weight": graph.tensor(f"{name}.weight", weight), "kernel": list(kernel)}
    if tensors.get("bias") is not None:
        attributes["bias"] = graph.tensor(f"{name}.bias", tensors["bias"].float())
    attributes |= {"activation": geometry.activation, **_walk(geometry)}
    image = graph.shape(inputs[0])[2:]
    shape = (graph.shape(inputs[0])[0], geometry.weight[0], *geometry.walk.output_size(image))
    y = graph.node("depthwise", name, inputs, shape, torch.float32, **attributes)
    return y if dtype == torch.float32 else _cast(graph, name, y, dtype)


def _cast(graph: Graph, name: str, x: int, dtype: torch.dtype) -> int:
    said = str(dtype).removeprefix("torch.")
    return graph.node("cast", f"{name}.{said}", [x], graph.shape(x), dtype, dtype=said)


def _pooled(graph: Graph, name: str, x: int, geometry: Geometry) -> int:
    shape = (graph.shape(x)[0], *_maps(graph, x, geometry))
    kernel = list(geometry.weight[2:])
    y = graph.node(_POOLS[geometry.kind], name, [x], shape, graph.dtype(x), kernel=kernel, **_walk(geometry))
    return _flattened(graph, name, y, geometry)


def _padded(graph: Graph, name: str, x: int, geometry: Geometry) -> int:
    """What F.pad makes of maps: zeros, or pixels that are already there."""
    assert geometry.pad is not None
    left, right, top, bottom = geometry.pad
    for axis, before, after in ((2, top, bottom), (3, left, right)):
        if not before and not after:
            continue
        shape = list(graph.shape(x))
        size, shape[axis] = shape[axis], shape[axis] + before + after
        if geometry.pad_mode == "constant":
            ends = {"before": [0, 0, 0, 0], "after": [0, 0, 0, 0]}
            ends["before"][axis], ends["after"][axis] = before, after
            x = graph.node("pad", f"{name}.pad", [x], shape, graph.dtype(x), **ends)
        else:
            places = _PLACES[geometry.pad_mode](torch.arange(-before, size + after), size)
            chosen = graph.constant(f"{name}.places", places)
            x = graph.node("take", f"{name}.pad", [x, chosen], shape, graph.dtype(x), axis=axis)
    return x


def _reflected(places: Tensor, size: int) -> Tensor:
    places = places.abs()
    return torch.where(places >= size, 2 * (size - 1) - places, places)


_PLACES: dict[str, Any] = {
    "reflect": _reflected,
    "replicate": lambda places, size: places.clamp(0, size - 1),
    "circular": lambda places, size: places % size,
}


__all__ = ["add_layer"]
