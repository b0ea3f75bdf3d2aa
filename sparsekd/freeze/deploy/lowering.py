"""A frozen graph as a file: walks the trace, and hands every node to the function for what it calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layer import FrozenLayer
from ..mutation import mutates
from ..sites import Recorder, clone
from ..trace import with_batch
from .graph import CannotExport, Graph, Shape
from .layers import add_layer

BATCHES = (2, 3)  # that are run, to see which sizes follow the batch


class Lowering:
    """Turns the nodes of a trace into nodes of a file, one after the other.

    known: value of each node, or several where it makes several. shapes, dtypes: of every tensor that a node makes.
    """

    def __init__(self, network: fx.GraphModule, inputs: tuple[Tensor, ...], table: Table) -> None:
        self.network, self.table = network, table
        self.graph = Graph()
        self.known: dict[fx.Node, Any] = {}
        self.shapes, self.dtypes = _shapes(network, inputs)
        self.position = {node: i for i, node in enumerate(network.graph.nodes)}

    def run(self, names: list[str]) -> list[fx.Node]:
        """Everything but the outputs; returns their nodes."""
        placeholders = [node for node in self.network.graph.nodes if node.op == "placeholder"]
        for node, name in zip(placeholders, names, strict=True):
            dtype = self.dtypes[node]
            value = self.graph.value(self.shapes[node], outside(dtype))
            self.graph.inputs.append({"name": name, "value": value})
            self.known[node] = self.cast(node, value, dtype)
        results: list[fx.Node] = []
        for node in self.network.graph.nodes:
            if node.op == "output":
                fx.node.map_arg(node.args[0], lambda one: results.append(one))  # type: ignore[arg-type]
            elif node.op != "placeholder":
                self._lower(node)
        return results

    def _lower(self, node: fx.Node) -> None:
        try:
            if node.op == "get_attr":
                held = operator.attrgetter(str(node.target))(self.network)
                if isinstance(held, Tensor):
                    self.known[node] = self.graph.constant(str(node.meta.get("reads", node.target)), held)
                return
            module = self.network.get_submodule(str(node.target)) if node.op == "call_module" else None
            self._check_mutation(node, module)
            if isinstance(module, FrozenLayer):
                operands = [self.value(one) for one in node.args]
                made = add_layer(self.graph, str(node.target), module, operands)
                self._expect(node, made)
                self.known[node] = made
                return
            lower = self.table(node, module)
            if lower is not None:
                made = lower(self, node, module)
                self._expect(node, made)
                self.known[node] = made
            elif node in self.shapes or self._makes_several(node):
                raise CannotExport("is not among the operations that a file can hold")
        except CannotExport as error:
            what = type(module).__name__ if node.op == "call_module" and module is not None else _called(node)
            raise CannotExport(
                f"{node.name} ({what}) {error}; leave it out of the network and compute it around the session, or "
                "replace it by operations of docs/file-format.md"
            ) from None

    def _makes_several(self, node: fx.Node) -> bool:
        """Whether an unknown node takes tensors and makes something else than a size."""
        takes = any(one in self.shapes for one in node.all_input_nodes)
        return takes and _called(node).split(".")[0] not in _SIZES

    def _expect(self, node: fx.Node, made: Any) -> None:
        if node in self.shapes and isinstance(made, int) and self.graph.shape(made) != self.shapes[node]:
            raise CannotExport(f"has the shape {self.shapes[node]} in torch and {self.graph.shape(made)} in the file")

    def _check_mutation(self, node: fx.Node, module: nn.Module | None) -> None:
        """In a file every value is made once: what is changed in place must not be read again."""
        if not mutates(node, module) or not node.args or not isinstance(node.args[0], fx.Node):
            return
        target, now = node.args[0], self.position[node]
        views = any(_is_view(user) for user in target.users) or _is_view(target) or target.op == "get_attr"
        if views or any(self.position[user] > now for user in target.users):
            raise CannotExport(f"changes {target.name} in place, which is read elsewhere too; write it without that")

    # What the functions of plain.py ask for.

    def value(self, node: Any, like: torch.dtype | None = None) -> int:
        """Of an argument; numbers become constants of the dtype ``like``."""
        if isinstance(node, fx.Node):
            made = self.known.get(node)
            if isinstance(made, int):
                return made
            raise CannotExport(f"takes {node.name}, which is no tensor of the file")
        if isinstance(node, (int, float)) and like is not None:
            if isinstance(node, float) and not like.is_floating_point:
                raise CannotExport(f"joins {like} and the number {node}")
            return self.graph.scalar(node, like)
        raise CannotExport(f"takes {str(node)[:60]}, which is no tensor")

    def emit(self, op: str, node: fx.Node, inputs: list[int], shape: Shape | None = None, **attributes: Any) -> int:
        """A node of the dtype of its first operand; its shape: that of the trace's node, unless another is given."""
        shape = self.shapes[node] if shape is None else shape
        return self.graph.node(op, node.name, inputs, shape, self.graph.dtype(inputs[0]), **attributes)

    def cast(self, node: fx.Node, x: int, dtype: torch.dtype) -> int:
        if self.graph.dtype(x) == dtype:
            return x
        said = str(dtype).removeprefix("torch.")
        return self.graph.node("cast", f"{node.name}.{said}", [x], self.graph.shape(x), dtype, dtype=said)


def outside(dtype: torch.dtype) -> torch.dtype:
    """As what a network takes and gives a dtype: numpy has no bfloat16."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


Lower = Callable[[Lowering, fx.Node, "nn.Module | None"], Any]
Table = Callable[[fx.Node, "nn.Module | None"], "Lower | None"]


def _called(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


_SIZES = ("getattr", "size", "dim", "numel", "ndimension", "len", "is_floating_point", "sym_size", "sym_numel")
_VIEWS = ("view", "reshape", "flatten", "transpose", "permute", "expand", "squeeze", "unsqueeze", "chunk", "split",
          "getitem", "select", "slice", "narrow", "unbind", "t", "contiguous", "detach")  # fmt: skip


def _is_view(node: fx.Node) -> bool:
    name = _called(node).split(".")[0]
    return name in _VIEWS or (node.op == "call_module" and "flatten" in name.lower())


def _shapes(
    network: fx.GraphModule, inputs: tuple[Tensor, ...]
) -> tuple[dict[fx.Node, Shape], dict[fx.Node, torch.dtype]]:
    seen: list[dict[fx.Node, tuple[int, ...]]] = []
    dtypes: dict[fx.Node, torch.dtype] = {}
    for batch in BATCHES:
        sizes: dict[fx.Node, tuple[int, ...]] = {}

        def see(node: fx.Node, x: Tensor, sizes: dict[fx.Node, tuple[int, ...]] = sizes) -> None:
            sizes[node] = tuple(x.shape)
            dtypes[node] = x.dtype

        with torch.no_grad():
            Recorder(network, see).run(*clone(with_batch(inputs, batch)))
        seen.append(sizes)
    return {node: _following(node, first, seen[1][node]) for node, first in seen[0].items()}, dtypes


def _following(node: fx.Node, first: tuple[int, ...], second: tuple[int, ...]) -> Shape:
    """Sizes of two batches as one shape in which -k is k times the batch."""
    shape = []
    for one, other in zip(first, second, strict=True):
        times, rest = divmod(one, BATCHES[0])
        if one == other:
            shape.append(one)
        elif not rest and times * BATCHES[1] == other:
            shape.append(-times)
        else:
            raise CannotExport(f"{node.name} has sizes that follow the batch in no simple way: {first}, then {second}")
    if sum(size < 0 for size in shape) > 1:
        raise CannotExport(f"{node.name} has the batch in its shape twice: {first}, then {second}")
    return tuple(shape)


__all__ = ["Lowering", "Table", "outside"]
