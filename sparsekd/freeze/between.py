"""What stands between layers and is none itself: a product with a gate for each channel, channels side by side, layer
norms. Taken in as sites of their own, they do not end a chain (chain.py)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..backends import cpu
from ..nn.layer import computes_as
from .dense import IN_PLACE
from .kinds import hooked
from .layer import FORMATS, Run, Samples, Step
from .plan import Geometry

aten = torch.ops.aten
MULTIPLIES = (operator.mul, torch.mul, aten.mul.Tensor, "mul", operator.imul, aten.mul_.Tensor, "mul_")
_CATS = (torch.cat, torch.concat, torch.concatenate, aten.cat.default)
_DTYPES = (torch.float32, torch.bfloat16)
MOST_OPERANDS = 256

Shapes = dict[fx.Node, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Between:
    """kind: "gate", "cat" or "layer_norm". operands: the nodes that it reads, a gate behind what it is for. channels:
    of each operand of a concatenation. epsilon: of a layer norm."""

    kind: str
    operands: tuple[str, ...]
    dtype: str
    channels: tuple[int, ...] = ()
    epsilon: float = 0.0


def between_of(node: fx.Node, module: nn.Module | None, shapes: Shapes) -> Between | None:
    """What a node does between layers, or None."""
    if node not in shapes or shapes[node][1] not in _DTYPES:
        return None
    dtype = str(shapes[node][1]).removeprefix("torch.")
    if module is not None:
        return _layer_norm(node, module, shapes, dtype)
    if node.target in MULTIPLIES:
        return _gate(node, shapes, dtype)
    return _cat(node, shapes, dtype) if node.target in _CATS else None


def _layer_norm(node: fx.Node, module: nn.Module, shapes: Shapes, dtype: str) -> Between | None:
    if not computes_as(module, nn.LayerNorm) or hooked(module) or node.kwargs or len(node.args) != 1:
        return None
    norm: Any = module
    (x,) = node.args
    fits = x in shapes and len(norm.normalized_shape) == 1 and len(shapes[x][0]) > 1  # type: ignore[index]
    return Between("layer_norm", (x.name,), dtype, epsilon=float(norm.eps)) if fits else None  # type: ignore


def _gate(node: fx.Node, shapes: Shapes, dtype: str) -> Between | None:
    if len(node.args) != 2 or node.kwargs or not all(one in shapes for one in node.args):
        return None
    first, second = node.all_input_nodes if len(node.all_input_nodes) == 2 else (node, node)
    for x, gate in ((first, second), (second, first)):
        shape = shapes[x][0]
        # In a map of one pixel either could be the gate, and torch is as fast.
        maps = len(shape) == 4 and shape[2:] != (1, 1) and shapes[x] == shapes[node]
        if maps and shapes[gate] == ((*shape[:2], 1, 1), shapes[node][1]):
            return Between("gate", (x.name, gate.name), dtype)
    return None


def _cat(node: fx.Node, shapes: Shapes, dtype: str) -> Between | None:
    given = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    tensors, dim, (shape, kind) = given.get("tensors"), given.get("dim", 0), shapes[node]
    if not isinstance(tensors, (list, tuple)) or not given.keys() <= {"tensors", "dim"}:
        return None
    if len(shape) not in (2, 4) or dim not in (1, 1 - len(shape)) or not 2 <= len(tensors) <= MOST_OPERANDS:
        return None
    for one in tensors:
        if one not in shapes or shapes[one][1] is not kind or len(shapes[one][0]) != len(shape):
            return None
        if (shapes[one][0][0], *shapes[one][0][2:]) != (shape[0], *shape[2:]):
            return None
    channels = tuple(shapes[one][0][1] for one in tensors)
    return Between("cat", tuple(one.name for one in tensors), dtype, channels)


# ---- Running it


def between_geometry(between: Between, shape: tuple[int, ...], **fused: Any) -> Geometry:
    """shape: of the first operand in the example."""
    if between.kind == "cat":
        return Geometry("cat", shape, between.channels)
    channels = shape[-1 if between.kind == "layer_norm" else 1]
    return Geometry(between.kind, shape, (channels,), groups=channels, epsilon=between.epsilon, **fused)


def torch_between(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Run:
    if geometry.kind == "cat":
        return lambda *operands, reuse=False: torch.cat(operands, 1)
    if geometry.kind == "layer_norm":
        epsilon, channels = geometry.epsilon, geometry.weight
        return lambda x, reuse=False: F.layer_norm(x, channels, weight, bias, epsilon)
    activate = IN_PLACE[geometry.activation]

    def run(x: Tensor, gate: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        y = x * gate
        return activate(y if residual is None else y.add_(residual))

    return run


def between_step(geometry: Geometry, weight: Tensor, bias: Tensor | None, memory_format: str) -> Step:
    """As a part of a chain."""
    dtype, image = weight.dtype, len(geometry.input) == 4 and geometry.kind != "layer_norm"
    layout = FORMATS[memory_format] if image else torch.contiguous_format
    name, last = str(dtype).removeprefix("torch."), image and memory_format == "channels_last"
    y = Samples(geometry.output, dtype, layout)
    pixels = math.prod(geometry.input[2:]) if image else 1
    reads: tuple[Samples, ...]
    if geometry.kind == "layer_norm":
        weight, shift = weight.float().contiguous(), torch.zeros_like(weight, dtype=torch.float32)
        shift = shift if bias is None else bias.float().contiguous()
        rows, pointers = math.prod(geometry.input[1:-1]), (weight.data_ptr(), shift.data_ptr())
        layer = cpu.native.layer_norm(rows, geometry.weight[0], *pointers, geometry.epsilon, name)
        reads = (y,)
    elif geometry.kind == "cat":
        reads = tuple(Samples((one, *geometry.input[2:]), dtype, layout) for one in geometry.weight)
        widths = [one * dtype.itemsize * (1 if last else pixels) for one in geometry.weight]
        layer = cpu.native.join(pixels if last else 1, widths)
    else:
        activation = cpu.native.ACTIVATIONS[geometry.activation]
        layer = cpu.native.gate(pixels, geometry.weight[0], last, activation, name)
        reads = (y, Samples((geometry.weight[0], 1, 1), dtype, layout), y)

    def add(network: Any, operands: Sequence[int], _x_last: bool, y: int) -> None:
        network.add(layer, [*operands, *(-1,) * (len(reads) - len(operands))], y)

    return Step(add, reads, y)


def between_operands(geometry: Geometry, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Random operands at the example's shape, drawn by a generator of our own: the caller's is left alone."""
    batch = geometry.input[:1]
    shapes: list[tuple[int, ...]] = [geometry.input]
    if geometry.kind == "cat":
        shapes = [(*batch, one, *geometry.input[2:]) for one in geometry.weight]
    elif geometry.kind == "gate":
        shapes += [(*batch, *geometry.weight, 1, 1), *([geometry.input] if geometry.residual else [])]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    image = len(geometry.input) == 4 and geometry.kind != "layer_norm"
    return [x.contiguous(memory_format=FORMATS[layout]) for x in drawn] if image else drawn
