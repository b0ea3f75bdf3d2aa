"""The graph of a file as it is put together: values, tensors and nodes (docs/file-format.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ...version import __version__

FORMAT, VERSION = "sparsekd-network", 1
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int64: "int64", torch.int32: "int32"}
DTYPES |= {torch.uint8: "uint8", torch.int8: "int8"}

Shape = tuple[int, ...]  # a size of -k is k times the batch


class CannotExport(ValueError):
    """Something in a network that a file cannot hold."""


@dataclass
class Graph:
    """Grows by `value`, `constant`, `tensor` and `node`; `encode` makes the bytes of a file."""

    values: list[dict[str, Any]] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def value(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        if dtype not in DTYPES:
            raise CannotExport(
                f"holds {str(dtype).removeprefix('torch.')} numbers; known are {', '.join(DTYPES.values())}"
            )
        self.values.append({"dtype": DTYPES[dtype], "shape": list(shape)})
        return len(self.values) - 1

    def tensor(self, name: str, tensor: Tensor) -> str:
        """Keeps a tensor under this name, or one like it."""
        if tensor.dtype not in DTYPES:
            raise CannotExport(f"holds a constant of {tensor.dtype}")
        while name in self.tensors:
            name += "_"
        self.tensors[name] = tensor.detach().contiguous()
        return name

    def constant(self, name: str, tensor: Tensor) -> int:
        value = self.value(tuple(tensor.shape), tensor.dtype)
        self.values[value]["tensor"] = self.tensor(name, tensor)
        return value

    def scalar(self, number: float | int, dtype: torch.dtype) -> int:
        return self.constant("number", torch.tensor(number, dtype=dtype))

    def shape(self, value: int) -> Shape:
        return tuple(self.values[value]["shape"])

    def dtype(self, value: int) -> torch.dtype:
        return next(dtype for dtype, name in DTYPES.items() if name == self.values[value]["dtype"])

    def node(
        self, op: str, name: str, inputs: Sequence[int], shape: Sequence[int], dtype: torch.dtype, /, **attributes: Any
    ) -> int:
        """Adds a node of one output, and returns that."""
        made = self.value(shape, dtype)
        self.add(op, name, inputs, [made], **attributes)
        return made

    def add(self, op: str, name: str, inputs: Sequence[int], outputs: Sequence[int], /, **attributes: Any) -> None:
        one = {"op": op, "name": name, "inputs": list(inputs), "outputs": list(outputs), "attributes": attributes}
        self.nodes.append(one)

    def encode(self, plan: dict[str, Any], result: Any) -> bytes:
        text = {
            "format": FORMAT,
            "version": VERSION,
            "producer": f"sparsekd {__version__}",
            "inputs": self.inputs,
            "outputs": self.outputs,
            "result": result,
            "values": self.values,
            "nodes": self.nodes,
            "plan": plan,
        }
        # Copies: safetensors refuses tensors that share memory.
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return to_bytes(tensors, {"sparsekd": json.dumps(text, allow_nan=False)})


__all__ = ["DTYPES", "FORMAT", "VERSION", "CannotExport", "Graph", "Shape"]
