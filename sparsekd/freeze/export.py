"""Frozen networks for those who record what a network does: compiled kernels leave nothing to record."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .call import Call
from .dense import IN_PLACE
from .layer import FrozenLayer
from .plan import Geometry

_functorch = torch._C._functorch


def refuse_recording(inputs: tuple[Any, ...]) -> None:
    """Raise RuntimeError where a call is recorded, or inputs are no memory: our kernels read and write addresses."""
    recorder = ""
    if torch._C._get_tracing_state() is not None:
        recorder = "torch.jit.trace, which the older ONNX exporter and OpenVINO's converter use,"
    elif _functorch.peek_interpreter_stack() is not None:
        recorder = "torch.func"
    elif torch._C._len_torch_dispatch_stack() and (get_proxy_mode() is not None or any(map(_is_fake, inputs))):
        recorder = "make_fx or torch.export"
    else:
        for x in inputs:
            if type(x) is not Tensor and type(x) is not nn.Parameter and isinstance(x, (Tensor, fx.Proxy)):
                recorder = "torch.fx" if isinstance(x, fx.Proxy) else f"a tensor of type {type(x).__name__}"
    if recorder:
        raise RuntimeError(
            f"sparsekd.FrozenModel: {recorder} cannot record a frozen network, whose compiled kernels work on memory; "
            "export frozen.to_torch(), the same network in plain torch with dense layers (for ONNX, "
            "sparsekd.export_onnx(frozen, path, example) does)"
        )


def _is_fake(x: Any) -> bool:
    return type(x) is not Tensor and isinstance(x, Tensor)


def plain_network(network: nn.Module, call: Call, rebuild: Callable[[Any], Any] | None, traced: bool) -> nn.Module:
    """A frozen network in plain torch; takes the tensors of a call one after the other. A trace keeps the names that
    they have in the model, which exporters name inputs by."""
    flat = plain(network)
    if not traced or not isinstance(flat, fx.GraphModule):
        return PlainNetwork(flat, call, rebuild, traced)
    if rebuild is not None:
        (output,) = (node for node in flat.graph.nodes if node.op == "output")
        result = rebuild(output.args[0])
        if not _is_plain(result):
            return PlainNetwork(flat, call, rebuild, traced)
        output.args = (result,)
        flat.recompile()
    return flat


def _is_plain(result: Any) -> bool:
    """Whether a graph can give this."""
    if type(result) in (tuple, list):
        return all(map(_is_plain, result))
    return all(map(_is_plain, result.values())) if type(result) is dict else isinstance(result, fx.Node)


class PlainNetwork(nn.Module):
    """One whose result is an object, or that keeps a forward of its own."""

    def __init__(self, network: nn.Module, call: Call, rebuild: Callable[[Any], Any] | None, traced: bool) -> None:
        super().__init__()
        self.network = network
        self._call = network if traced else call.calls(network)
        self._rebuild = rebuild

    def forward(self, *inputs: Tensor) -> Any:
        y = self._call(*inputs)
        return y if self._rebuild is None else self._rebuild(y)


class PlainLayer(nn.Module):
    """One frozen layer in plain torch."""

    def __init__(self, layer: FrozenLayer) -> None:
        super().__init__()
        self.geometry: Geometry = layer.geometry
        bias = dict(layer.named_buffers()).get("bias")
        if not self.geometry.bare:
            weight = layer.dense_weight()
            self.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor, *others: Tensor | None, reuse: bool = False) -> Tensor:
        if self.geometry.kind == "cat":
            return torch.cat((x, *others), 1)  # type: ignore[arg-type]
        gate, residual = (*others, None)[:2] if self.geometry.kind == "gate" else (None, (*others, None)[0])
        y = self._compute(x) if gate is None else x * gate
        if residual is not None:
            y = y + residual
        return ACTIVATIONS[self.geometry.activation](y)

    def _compute(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        if geometry.kind == "linear":
            return F.linear(x, self.weight, self.bias)
        if geometry.kind == "layer_norm":
            return F.layer_norm(x, geometry.weight, self.weight, self.bias, geometry.epsilon)
        if geometry.kind == "norm":
            assert self.bias is not None
            return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        if geometry.pool:
            return self._pool(x)
        if geometry.kind == "conv_transpose2d":
            sizes = (geometry.stride, geometry.padding, geometry.output_padding, geometry.groups, geometry.dilation)
            return F.conv_transpose2d(x, self.weight, self.bias, *sizes)
        if geometry.pad is not None:
            x = F.pad(x, geometry.pad, geometry.pad_mode)
        return F.conv2d(x, self.weight, self.bias, *geometry.walk.steps)

    def _pool(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        if geometry.whole:
            return x.mean((2, 3), keepdim=not geometry.flat)
        window = (geometry.weight[2:], geometry.stride, geometry.padding)
        y = F.max_pool2d(x, *window, geometry.dilation) if geometry.kind == "max" else F.avg_pool2d(x, *window)
        return y.flatten(1) if geometry.flat else y


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
assert ACTIVATIONS.keys() == IN_PLACE.keys()


def plain(network: nn.Module) -> nn.Module:
    """The network with every frozen layer as a `PlainLayer`."""
    if isinstance(network, FrozenLayer):
        return PlainLayer(network)
    if not isinstance(network, fx.GraphModule):
        return _replaced(network)
    graph = fx.Graph()
    graph.output(graph.graph_copy(network.graph, {}))
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            part = operator.attrgetter(str(node.target))(network)
            parts[str(node.target)] = plain(part) if isinstance(part, nn.Module) else part
    return fx.GraphModule(parts, graph)


def _replaced(network: nn.Module) -> nn.Module:
    layers = {id(module): PlainLayer(module) for module in network.modules() if isinstance(module, FrozenLayer)}
    memo: dict[int, Any] = {**layers, **{id(x): x for x in (*network.parameters(), *network.buffers())}}
    return copy.deepcopy(network, memo)


__all__ = ["plain", "plain_network", "refuse_recording"]
