"""Pooling in a trace: which nodes take maxima or means over windows of maps, and over which."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

Window = tuple[int, ...]  # kernel, stride, padding and dilation, two numbers each

# Arguments behind the input as torch orders them, and what they are if not given.
_WINDOW = {"kernel_size": None, "stride": None, "padding": 0}
_MAX = {**_WINDOW, "dilation": 1, "ceil_mode": False, "return_indices": False}
_MEAN = {**_WINDOW, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
_ADAPTIVE = {"output_size": None}
_AXES = {"dim": None, "keepdim": False}
_ARGUMENTS: dict[Any, dict[str, Any]] = {
    **dict.fromkeys((nn.MaxPool2d, F.max_pool2d), _MAX),
    **dict.fromkeys((nn.AvgPool2d, F.avg_pool2d), _MEAN),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d), _ADAPTIVE),
    **dict.fromkeys((torch.mean, "mean"), _AXES),
}


def window_of(node: fx.Node, module: nn.Module | None, image: tuple[int, ...]) -> tuple[str, Window] | None:
    """("max" or "mean", its window) of a node that pools maps of this size, None of any other."""
    known = _ARGUMENTS.get(node.target if module is None else type(module))
    if known is None:
        return None
    functional = {**dict(zip(known, node.args[1:], strict=False)), **node.kwargs}
    given = functional if module is None else {name: getattr(module, name) for name in known}
    if not given.keys() <= known.keys():
        return None
    options = {**known, **given}
    if known is _ADAPTIVE or known is _AXES:
        whole = options["output_size"] in (1, (1, 1), [1, 1]) if known is _ADAPTIVE else _is_image(options["dim"])
        return ("mean", (*image, 1, 1, 0, 0, 1, 1)) if whole else None
    sizes = [_pair(options[name]) for name in _WINDOW]
    sizes = [sizes[0], sizes[1] or sizes[0], sizes[2], _pair(options.get("dilation", 1))]
    if None in sizes or any(options[name] != known[name] for name in known if name not in (*_WINDOW, "dilation")):
        return None
    return "max" if known is _MAX else "mean", tuple(size for pair in sizes for size in pair)  # type: ignore[union-attr]


def is_flatten(node: fx.Node, module: nn.Module | None) -> bool:
    """[N, C, 1, 1] to [N, C]."""
    given = {**dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)), **node.kwargs}
    if type(module) is nn.Flatten:
        given = {"start_dim": module.start_dim, "end_dim": module.end_dim}
    elif module is not None or node.target not in (torch.flatten, "flatten"):
        return False
    return bool(given.get("start_dim", 0) == 1 and given.get("end_dim", -1) in (-1, 3))


def _is_image(dims: Any) -> bool:
    return isinstance(dims, (tuple, list)) and sorted(dim % 4 for dim in dims) == [2, 3]


def _pair(size: Any) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else size
    return tuple(pair) if isinstance(pair, (tuple, list)) and all(isinstance(one, int) for one in pair) else None  # type: ignore[return-value]
