"""Pooling in a trace: which nodes take maxima or means over windows of maps, and over which."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .kinds import hooked

Window = tuple[int, ...]  # kernel, stride, padding and dilation, two numbers each; () for whole images

# Arguments behind the input as torch orders them, and what they are if not given.
_WINDOW = {"kernel_size": None, "stride": None, "padding": 0}
_MAX = {**_WINDOW, "dilation": 1, "ceil_mode": False, "return_indices": False}
_MEAN = {**_WINDOW, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
_ADAPTIVE = {"output_size": None}
_AXES = {"dim": None, "keepdim": False}
aten = torch.ops.aten
_FUNCTIONS: dict[Any, dict[str, Any]] = {
    F.max_pool2d: _MAX,
    aten.max_pool2d.default: {name: _MAX[name] for name in (*_WINDOW, "dilation", "ceil_mode")},
    **dict.fromkeys((F.avg_pool2d, aten.avg_pool2d.default), _MEAN),
    **dict.fromkeys((F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default), _ADAPTIVE),
    **dict.fromkeys((torch.mean, aten.mean.dim), _AXES),
}
_METHODS = {"mean": _AXES}
_MODULES: dict[Any, dict[str, Any]] = {nn.MaxPool2d: _MAX, nn.AvgPool2d: _MEAN, nn.AdaptiveAvgPool2d: _ADAPTIVE}


def window_of(node: fx.Node, module: nn.Module | None) -> tuple[str, Window] | None:
    """("max" or "mean", its window) of a node that pools maps, None of any other."""
    known: dict[str, Any] | None = None
    if module is not None:
        known = None if hooked(module) else _MODULES.get(type(module))
    elif node.op == "call_function":
        known = _FUNCTIONS.get(node.target)
    elif node.op == "call_method":  # a layer of the model may have the name of a method
        known = _METHODS.get(str(node.target))
    if known is None:
        return None
    functional = {**dict(zip(known, node.args[1:], strict=False)), **node.kwargs}
    given = functional if module is None else {name: getattr(module, name) for name in known}
    if not given.keys() <= known.keys():
        return None
    options = {**known, **given}
    if known is _ADAPTIVE or known is _AXES:
        whole = options["output_size"] in (1, (1, 1), [1, 1]) if known is _ADAPTIVE else _is_image(options["dim"])
        return ("mean", ()) if whole else None
    sizes = [_pair(options[name]) for name in _WINDOW]
    sizes = [sizes[0], sizes[1] or sizes[0], sizes[2], _pair(options.get("dilation", 1))]
    if None in sizes or any(options[name] != known[name] for name in known if name not in (*_WINDOW, "dilation")):
        return None
    return "max" if "dilation" in known else "mean", tuple(size for pair in sizes for size in pair)  # type: ignore[union-attr]


def is_flatten(node: fx.Node, module: nn.Module | None) -> bool:
    """[N, C, 1, 1] to [N, C]."""
    given = {**dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)), **node.kwargs}
    if type(module) is nn.Flatten:
        given = {"start_dim": module.start_dim, "end_dim": module.end_dim}
    elif module is not None or node.target not in (torch.flatten, "flatten", aten.flatten.using_ints):
        return False
    return bool(given.get("start_dim", 0) == 1 and given.get("end_dim", -1) in (-1, 3))


def _is_image(dims: Any) -> bool:
    return isinstance(dims, (tuple, list)) and sorted(dim % 4 for dim in dims) == [2, 3]


def _pair(size: Any) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else size
    return tuple(pair) if isinstance(pair, (tuple, list)) and all(isinstance(one, int) for one in pair) else None  # type: ignore[return-value]
