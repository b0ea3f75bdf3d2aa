"""The dense peer of structured pruning: a network whose inner channels are really gone, at the same share of weights.

A channel can be cut where one layer's output reaches exactly one other layer through operations on single channels
(batch norm, activations, pooling), as between the two convolutions of a residual block. What the residual stream
touches stays as wide as it is.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_LAYERS = (nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_BY_CHANNEL = (
    *_NORMS, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Dropout, nn.Identity,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
)  # fmt: skip
_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.silu, F.gelu, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    torch.flatten,
}  # fmt: skip
_METHODS = {"relu", "relu_", "flatten", "contiguous"}


def compact(model: nn.Module, density: float) -> tuple[nn.Module, nn.Module]:
    """(zeroed, compacted): the same function with channels that nobody reads, and without them.

    The largest share of inner channels is kept (by norm, the same share everywhere) with which the weights of
    convolutions and linear layers come to at most `density` of what they were, or a 64th of the channels if that is not
    reachable. Raises ValueError where torch.fx cannot trace the model or no channel can be cut.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # torch.fx raises whatever the model's Python code does with a proxy
        raise ValueError(f"channels cannot be cut: torch.fx cannot trace the network ({error})") from error
    chains = _chains(graph, dict(model.named_modules()))
    if not chains:
        raise ValueError("channels cannot be cut: no layer feeds exactly one other layer")
    before = count_weights(model)
    low, high = 1, 64  # 64ths of the channels: `low` is what is taken, `high` is too much
    while high - low > 1:
        middle = (low + high) // 2
        smaller = copy.deepcopy(model)
        _cut(smaller, chains, middle / 64)
        low, high = (middle, high) if count_weights(smaller) <= density * before else (low, middle)
    smaller = copy.deepcopy(model)
    dropped = _cut(smaller, chains, low / 64)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for reader, channels in dropped.items():
            weight: Any = zeroed.get_submodule(reader).weight
            weight[:, channels] = 0
    return zeroed, smaller


def count_weights(model: nn.Module) -> int:
    """Weights of all dense convolutions and linear layers."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, _LAYERS))


def _chains(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[tuple[str, list[str], str]]:
    """(writer, batch norms between, reader) by module name."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        writer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(writer, _LAYERS) or getattr(writer, "groups", 1) != 1:
            continue
        chain: list[str] = [str(node.target)]
        norms: list[str] = []
        here = node
        while len(here.users) == 1:
            (here,) = here.users
            module = modules.get(str(here.target)) if here.op == "call_module" else None
            if isinstance(module, _LAYERS):
                width = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
                chain.append(str(here.target))
                # A linear layer that reads flattened maps has more inputs than there are channels.
                if width == len(writer.weight) and getattr(module, "groups", 1) == 1 and _once(calls, chain + norms):
                    found.append((chain[0], norms, chain[1]))
                break
            if isinstance(module, _NORMS):
                norms.append(str(here.target))
            elif not _by_channel(here, module):
                break
    return found


def _once(calls: Counter[str], names: list[str]) -> bool:
    return all(calls[name] == 1 for name in names)


def _by_channel(node: fx.Node, module: Any) -> bool:
    if node.op == "call_module":
        return isinstance(module, _BY_CHANNEL)
    return (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )


@torch.no_grad()
def _cut(model: nn.Module, chains: list[tuple[str, list[str], str]], share: float) -> dict[str, Tensor]:
    """Cut every chain in place, from the first on; the channels dropped by the name of their reader."""
    dropped = {}
    for writer_name, norms, reader_name in chains:
        writer: Any = model.get_submodule(writer_name)
        reader: Any = model.get_submodule(reader_name)
        norm = writer.weight.flatten(1).norm(dim=1)
        keep = norm.topk(max(1, math.floor(share * len(norm)))).indices.sort().values
        gone = torch.ones(len(norm), dtype=torch.bool, device=norm.device)
        gone[keep] = False
        dropped[reader_name] = gone
        for name in (writer_name, *norms):
            _keep_outputs(model.get_submodule(name), keep)
        reader.weight = nn.Parameter(reader.weight[:, keep])
        setattr(reader, "in_channels" if isinstance(reader, nn.Conv2d) else "in_features", len(keep))
    return dropped


def _keep_outputs(module: Any, keep: Tensor) -> None:
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            setattr(module, name, nn.Parameter(getattr(module, name)[keep]))
    for name in ("running_mean", "running_var"):
        if getattr(module, name, None) is not None:
            setattr(module, name, getattr(module, name)[keep])
    for name in ("out_channels", "out_features", "num_features"):
        if hasattr(module, name):
            setattr(module, name, len(keep))
