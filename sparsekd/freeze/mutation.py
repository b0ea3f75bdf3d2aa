"""Which nodes of a trace may change a tensor that they are given."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

_IN_PLACE_OPERATORS = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
    operator.setitem,
)


def mutates(node: fx.Node, module: nn.Module | None) -> bool:
    """May the node change a tensor it is given? Errs towards yes."""
    if module is not None:
        return any(bool(getattr(one, "inplace", False)) for one in module.modules())
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.target in _IN_PLACE_OPERATORS or "out" in node.kwargs:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    said = any(arg is True for arg in (*node.args[1:], node.kwargs.get("inplace")))  # `is`: sum(1) says no such thing
    return (name.endswith("_") and not name.endswith("__")) or said


__all__ = ["mutates"]
